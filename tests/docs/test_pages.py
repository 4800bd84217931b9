"""The pages run: every block of README.md and of the guides, see pages.py; and what the runner itself must catch."""

import pytest
from pages import PAGES, ROOT, run_page, same
from readme_picture import PICTURE, draw_picture


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_blocks_of_a_page_print_what_it_shows(page, tmp_path):
    _, wrong = run_page(page, tmp_path)
    assert not wrong, "\n".join([*wrong, f"to write it into the page: python tests/docs/pages.py --update {page}"])


def test_the_picture_of_the_readme_is_what_the_model_says():
    assert same(PICTURE.read_text(encoding="utf-8"), draw_picture()), "python tests/docs/pages.py --update README.md"


def page_of(*blocks: str) -> str:
    return "# A page\n\n" + "\n\nWords.\n\n".join(blocks) + "\n"


def python(text: str, shown: str | None = None) -> str:
    return f"```python\n{text}\n```" + (f"\n\n```text\n{shown}\n```" if shown is not None else "")


def bash(text: str, shown: str | None = None) -> str:
    return python(text, shown).replace("```python", "```bash")


def wrongs(tmp_path, *blocks: str) -> list[str]:
    (tmp_path / "folder").mkdir()
    (tmp_path / "page.md").write_text(page_of(*blocks))
    return run_page(tmp_path / "page.md", tmp_path / "folder")[1]


NOT_RUN = "<!-- not run: a 7B model -->\n"


def test_blocks_share_a_folder_and_a_namespace_and_outputs_are_compared(tmp_path):
    assert not wrongs(
        tmp_path,
        "<!-- file: a.txt -->\n```json\n[1]\n```",
        python("x = open('a.txt').read().strip()"),
        python("print(x, 0.1234, '12 s')", "[1] 0.1235 7.5 s"),
        bash("cat a.txt | tr 1 2 > b.txt\nfor i in 1 2; do cat b.txt; done", "[2]\n[2]"),
        NOT_RUN + bash("trl-mprm score M rows.jsonl --url http://127.0.0.1:8000 | head -3  # a comment"),
        bash("trl-mprm --version | sed 's/[0-9.]*$/N/'\nv=$(trl-mprm --version); test -n \"$v\"", "trl-mprm N"),
    )


@pytest.mark.parametrize(
    ("block", "told"),
    [
        (python("print(1)", "2"), "another output"),
        (python("print(0.5)", "0.7"), "another output"),
        (python("1 / 0"), "ZeroDivisionError"),
        (bash("false\necho", ""), "exit code 1"),
        (bash("trl-mprm score no/such/folder --question q --step s"), "exit code 2"),
        (NOT_RUN + python("from trl_mprm import Nothing"), "ImportError"),
        (NOT_RUN + python("from trl_mprm import top_fraction\ntop_fraction(rows, fractoin=1)"), "fractoin"),
        (NOT_RUN + python("f("), "SyntaxError"),
        (NOT_RUN + bash("trl-mprm score M --no-such-flag"), "no-such-flag"),
        (NOT_RUN + bash("trl-mprm train --config recipes/none.yaml"), "none.yaml"),
        (NOT_RUN + bash("trl-mprm train --model_name_or_path M --learnin_rate 1"), "learnin_rate"),
        (NOT_RUN + bash("if true"), "syntax error"),
        ("```diff\n-import no_such_module\n+from trl_mprm import Nothing\n```", "ImportError"),
    ],
)
def test_what_is_wrong_is_told(block, told, tmp_path):
    (wrong,) = wrongs(tmp_path, block)
    assert told in wrong


def test_update_writes_what_was_printed_and_nothing_else(tmp_path):
    page = page_of(python("print(1)", "2"), bash("echo a b", ""), NOT_RUN + bash("trl-mprm select d", "any"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "page.md").write_text(page)
    updated, _ = run_page(tmp_path / "page.md", tmp_path / "folder")
    assert updated == page.replace("text\n2\n", "text\n1\n").replace("text\n\n", "text\na b\n")
