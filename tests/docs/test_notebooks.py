"""The notebooks run from top to bottom and print what is kept in them, see notebooks.py."""

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_notebook, new_output
from notebooks import NOTEBOOKS, run_notebook


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_prints_what_it_keeps(path, tmp_path):
    _, differ = run_notebook(path, tmp_path)
    assert not differ, "\n".join([*differ, f"to keep it: python tests/docs/notebooks.py --update {path}"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_fit_for_colab_and_small(path):
    title, install, *cells = nbformat.read(path, as_version=4).cells
    assert title.source.startswith("# ") and "%pip install" in install.source and not install.outputs
    assert 'find_spec("trl_mprm") is None' in install.source  # skipped where it is installed
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert sum(output.output_type == "stream" for output in outputs) > 3
    assert sum("image/png" in output.get("data", {}) for output in outputs) <= 1
    assert path.stat().st_size < 40_000 and "/root/" not in path.read_text() and "/tmp/" not in path.read_text()


def test_another_output_is_told_and_an_error_stops(tmp_path):
    def write(source, kept):
        output = new_output("stream", name="stdout", text=kept)
        nbformat.write(new_notebook(cells=[new_code_cell(source, outputs=[output])]), tmp_path / "a.ipynb")
        return tmp_path / "a.ipynb"

    assert run_notebook(write("print('score', 0.123)", "score 0.124\n"), tmp_path)[1] == []
    done, (told,) = run_notebook(write("print('score', 0.123)", "score 0.173\n"), tmp_path)
    assert "-score 0.173" in told and "+score 0.123" in told and done.cells[0].outputs[0].text == "score 0.123\n"
    with pytest.raises(CellExecutionError, match="no such thing"):
        run_notebook(write("raise ValueError('no such thing')", ""), tmp_path)
