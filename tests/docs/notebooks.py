"""
Run the notebooks of recipes/notebooks, each in an empty folder.

    python tests/docs/notebooks.py                                               # run all, tell what differs
    python tests/docs/notebooks.py --update recipes/notebooks/score_and_rank.ipynb   # run one, keep what it prints

A cell must not raise. What it prints is compared as in the pages, see pages.py; pictures, tables of a training and the
rendered card are kept and not compared. Warnings and progress bars on standard error are not kept.
"""

import argparse
import difflib
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from pages import ROOT, same


NOTEBOOKS = sorted((ROOT / "recipes" / "notebooks").glob("*.ipynb"))


def run_notebook(path: Path, folder: Path) -> tuple[nbformat.NotebookNode, list[str]]:
    """Run a notebook in an empty folder; return it with its new outputs, and what differs from the kept ones, in lines."""
    shown, done = (nbformat.read(path, as_version=4) for _ in range(2))
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(done, kernel_name="python3", timeout=300, record_timing=False, resources=resources).execute()
    for cell in done.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "image/png" in (data := output.get("data", {})):
                    data.pop("image/jpeg", None)  # the same picture once more
    differ = []
    for number, cells in enumerate(zip(shown.cells, done.cells, strict=True), start=1):
        before, after = (printed(cell) for cell in cells)
        if not same(before, after):
            lines = difflib.unified_diff(before.splitlines(), after.splitlines(), "kept", "printed", n=1, lineterm="")
            differ.append("\n".join([f"{path.name}, cell {number}: another output", *lines]))
    return done, differ


def printed(cell: nbformat.NotebookNode) -> str:
    outputs = cell.get("outputs", [])
    return "".join(output.text for output in outputs if output.output_type == "stream")


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the notebooks and compare what they print.")
    parser.add_argument("notebooks", nargs="*", type=Path, default=NOTEBOOKS)
    parser.add_argument("--update", action="store_true", help="write the new outputs into the notebooks")
    args = parser.parse_args()
    failed = False
    for path in args.notebooks:
        with tempfile.TemporaryDirectory() as folder:
            done, differ = run_notebook(path, Path(folder))
        print(f"{path}: {'all as kept' if not differ else f'{len(differ)} differ'}", *differ, sep="\n")
        if args.update:
            nbformat.write(done, path)
        failed = failed or bool(differ)
    return int(failed and not args.update)


if __name__ == "__main__":
    sys.exit(main())
