"""
Run what the pages show: README.md and the guides, recipes/*.md.

    python tests/docs/pages.py                               # run all pages, tell what differs
    python tests/docs/pages.py --update recipes/select.md    # run one page, write what its blocks print into it

How to write a page:

- A ```python or ```bash block is run. Where a ```text block follows it (only blank lines between), the block must print
  exactly that text; a number with decimals may differ by one in its last place, and a time (`3.2 s`, `12 ms`) by any
  amount. Standard output counts, standard error does not. The block must succeed.
- For a new block write an empty ```text block after it, then run with --update.
- All blocks of a page share one empty working directory and one Python namespace (`print(...)`: nothing is echoed). The
  directory has links to `recipes`, `trl_mprm` and `tests` of the checkout, so a command may say
  `trl-mprm score trl_mprm/demo/miniature-prm ...`, as in a clone. Nothing is kept.
- A bash block is run by `bash -eu -o pipefail`: pipes, variables, here-documents and loops work. Each `trl-mprm ...` in it
  runs in this process, where torch is imported already. What ends only on Ctrl-C, as `trl-mprm serve`, cannot be run.
- A block that cannot run here says why, in a comment right before it:

      <!-- not run: a 7B model -->

  It is checked all the same. Python: it compiles, its imports exist, and functions, methods and keyword arguments that
  can be found by name exist (objects of earlier blocks count). bash: its syntax, the flags of each `trl-mprm ...`, and the
  files in `recipes/` and `trl_mprm/`. A ```text block after it is left as it is.
- A ```diff block is checked like a Python block that is not run: the lines without sign and those with `+`.
- A block of any other language (```json, ```yaml, ...) right after the comment `<!-- file: rows.jsonl -->` is written to
  that file in the working directory.
- Quick is best: all pages together should take about a minute. A training of a few steps on
  `trl_mprm/demo/qwen2.5-vl-miniature` takes seconds.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import inspect
import io
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import traceback
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from readme_picture import PICTURE, draw_picture


ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "recipes").glob("*.md"))]

BLOCK = re.compile(
    r"(?:^<!-- (?P<note>not run|file): (?P<words>[^\n]+?) -->\n\s*)?"
    r"^(?P<indent> *)```(?P<language>[\w-]*)[^\n]*\n(?P<text>.*?)^(?P=indent)```[ ]*$"
    r"(?P<output>\n\s*^(?P=indent)```text\n(?P<shown>.*?)^(?P=indent)```[ ]*$)?",
    re.MULTILINE | re.DOTALL,
)
SECONDS = re.compile(r"\b[\d,.]+ (s|ms|seconds|minutes)\b")
DECIMALS = re.compile(r"\d+\.\d+")

# Stands on the PATH as `trl-mprm`: hands arguments and standard input over, prints what comes back.
CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    request = {{"argv": sys.argv[1:], "folder": os.getcwd(), "stdin": sys.stdin.read()}}
    server.connect({address!r})
    server.sendall(json.dumps(request).encode() + b"\\n")
    reply = json.loads(server.makefile("rb").readline())
sys.stdout.write(reply["stdout"])
sys.stderr.write(reply["stderr"])
sys.exit(reply["code"])
"""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the comment before it and the output after it, and its place in the page."""

    language: str
    text: str
    note: str | None
    words: str | None
    shown: str | None
    span: tuple[int, int]  # of the shown output
    line: int


def read_blocks(page: str) -> Iterator[Block]:
    for match in BLOCK.finditer(page):
        indent = match["indent"]
        text = re.sub(rf"^{indent}", "", match["text"], flags=re.MULTILINE)
        line = page.count("\n", 0, match.start("text"))
        yield Block(
            match["language"], text, match["note"], match["words"], match["shown"], match.span("shown"), line
        )  # fmt: skip


def same(shown: str, printed: str) -> bool:
    """Whether a text is what was printed, but for times, and for the last place of a number with decimals."""
    shown, printed = (SECONDS.sub(r"N \1", text).strip("\n") for text in (shown, printed))
    if DECIMALS.sub("0.0", shown) != DECIMALS.sub("0.0", printed):
        return False
    pairs = zip(DECIMALS.findall(shown), DECIMALS.findall(printed), strict=True)
    return all(
        len(a.partition(".")[2]) == len(b.partition(".")[2])
        and abs(float(a) - float(b)) < 1.5 * 10.0 ** -len(a.partition(".")[2])
        for a, b in pairs
    )


class Session:
    """The working directory and the namespace that the blocks of a page share."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.main = types.ModuleType("__main__")
        for name in ("recipes", "trl_mprm", "tests"):
            (folder / name).symlink_to(ROOT / name)

    def run(self, block: Block) -> str:
        """Run a block; return what it printed on standard output."""
        if block.note == "file":
            (self.folder / block.words).write_text(block.text, encoding="utf-8")
        elif block.note == "not run" or block.language == "diff":
            self._check(block)
        elif block.language == "python":
            with _captured() as (out, _), contextlib.chdir(self.folder):
                exec(compile(block.text, f"block at line {block.line}", "exec"), self.main.__dict__)
            return _text(out)
        elif block.language == "bash":
            return self._run_bash(block.text)
        return ""

    def _run_bash(self, text: str) -> str:
        if "pip install" in text:
            raise ValueError("pip install would change this environment: mark the block as not run")
        with tempfile.TemporaryDirectory() as own, socket.socket(socket.AF_UNIX) as server:
            address, client = f"{own}/socket", Path(own, "trl-mprm")
            client.write_text(CLIENT.format(python=sys.executable, address=address))
            client.chmod(0o755)
            server.bind(address)
            server.listen()
            server.settimeout(0.1)
            path = os.pathsep.join([own, str(Path(sys.executable).parent), os.environ["PATH"]])
            environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
            with open(f"{own}/out", "w+") as out, open(f"{own}/err", "w+") as err:
                bash = subprocess.Popen(
                    ["bash", "-eu", "-o", "pipefail", "-c", text],
                    cwd=self.folder, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                )  # fmt: skip
                while bash.poll() is None:
                    with contextlib.suppress(TimeoutError):
                        _answer(server.accept()[0])
                out.seek(0)
                err.seek(0)
                if bash.returncode:
                    raise RuntimeError(f"exit code {bash.returncode}\n{out.read()}{err.read()}")
                return out.read()

    def _check(self, block: Block) -> None:
        if block.language in ("python", "diff"):
            text = block.text
            if block.language == "diff":
                text = "".join(line[1:] for line in text.splitlines(keepends=True) if line[0] in " +")
            check_python(text, dict(self.main.__dict__))
        elif block.language == "bash":
            check_bash(block.text)


def _answer(connection: socket.socket) -> None:
    """Run one `trl-mprm` command of a bash block in this process."""
    from trl_mprm.cli import main

    with connection:
        connection.settimeout(None)
        request = json.loads(connection.makefile("rb").readline())
        with _captured(request["stdin"]) as (out, err), contextlib.chdir(request["folder"]):
            try:
                code = main(request["argv"])
            except SystemExit as exit:
                code = exit.code if isinstance(exit.code, int) else 0 if exit.code is None else 1
            except Exception:  # as in a process of its own
                traceback.print_exc()
                code = 1
        reply = {"code": code, "stdout": _text(out), "stderr": _text(err)}
        connection.sendall(json.dumps(reply).encode() + b"\n")


@contextlib.contextmanager
def _captured(stdin: str = "") -> Iterator[tuple[io.TextIOWrapper, io.TextIOWrapper]]:
    out, err, given = (io.TextIOWrapper(io.BytesIO(text), "utf-8") for text in (b"", b"", stdin.encode()))
    before, sys.stdin = sys.stdin, given
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield out, err
    finally:
        sys.stdin = before


def _text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    return stream.buffer.getvalue().decode()


# ---- blocks that are not run


def check_python(text: str, names: dict[str, Any]) -> None:
    """Check that a text compiles, that its imports exist, and the arguments of the calls whose function can be found."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            try:
                exec(compile(ast.Module([node], []), "imports", "exec"), names)
            except ModuleNotFoundError as error:
                if str(error.name).startswith("trl_mprm"):
                    raise
    made = _made(tree, names)
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        function = _find(call.func, names, made)
        if function is None:
            continue
        given = {keyword.arg for keyword in call.keywords} - {None}
        parameters = inspect.signature(function).parameters
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            if unknown := given - parameters.keys():
                raise TypeError(f"line {call.lineno}: {ast.unparse(call.func)} has no argument {sorted(unknown)[0]}")


def _made(tree: ast.AST, names: dict[str, Any]) -> dict[str, type]:
    """The names that are assigned an object of a known class: `x = Class(...)`, or `Class.from_pretrained(...)`."""
    made = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and isinstance(node.targets[0], ast.Name):
            function = node.value.func
            if isinstance(function, ast.Attribute) and function.attr == "from_pretrained":
                function = function.value
            if isinstance(found := _find(function, names, {}), type):
                made[node.targets[0].id] = found
    return made


def _find(node: ast.expr, names: dict[str, Any], made: dict[str, type]) -> Any:
    """The object that a dotted name means, None if that cannot be told; what a known object lacks is an error."""
    if isinstance(node, ast.Name):
        return made.get(node.id, names.get(node.id))
    if isinstance(node, ast.Attribute) and (owner := _find(node.value, names, made)) is not None:
        if isinstance(owner, type) and isinstance(node.value, ast.Name) and node.value.id in made:
            if not hasattr(owner, node.attr):
                return None  # set by its __init__, perhaps
        return getattr(owner, node.attr)
    return None


def check_bash(text: str) -> None:
    """Check the syntax of a text, the flags of each `trl-mprm` command, and the files of the checkout that it names."""
    checked = subprocess.run(["bash", "-n", "-c", text], capture_output=True, text=True, timeout=60)
    if checked.returncode:
        raise ValueError(checked.stderr)
    for line in re.sub(r"\\\n", " ", text).splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True  # else the colon of an address ends a word
        words = list(lexer)
        for word in words:
            if word.startswith(("recipes/", "trl_mprm/")) and not (ROOT / word).exists():
                raise FileNotFoundError(word)
        if "trl-mprm" in words:
            argv = words[words.index("trl-mprm") + 1 :]
            end = next((at for at, word in enumerate(argv) if set(word) <= set("();<>|&")), len(argv))
            check_command(argv[:end])


def check_command(argv: list[str]) -> None:
    from trl_mprm.cli import _parser
    from trl_mprm.cli.preflight import check_train

    with contextlib.chdir(ROOT):
        if argv[0] == "train":
            check_train([*argv[1:], *["--smoke"] * ("--smoke" not in argv)])  # --smoke asks for no data
            return
        with contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                _parser(argv[0]).parse_args(argv)
            except SystemExit as error:
                if error.code:
                    raise ValueError(f"trl-mprm {' '.join(argv)}: {said.getvalue()}") from error


# ---- pages


def run_page(path: Path, folder: Path) -> tuple[str, list[str]]:
    """Run a page in an empty folder; return the page with what its blocks print, and what was wrong, in lines."""
    page = path.read_text(encoding="utf-8")
    session, wrong, parts, end = Session(folder), [], [], 0
    for block in read_blocks(page):
        place = f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name}:{block.line}"
        try:
            printed = session.run(block)
        except Exception:  # a block may raise anything
            wrong.append(f"{place}: the block fails\n{traceback.format_exc(limit=-3)}")
            continue
        if block.shown is None or block.note or block.language not in ("python", "bash"):
            continue
        printed = "\n".join(line.rstrip() for line in printed.strip("\n").split("\n"))
        if not same(block.shown, printed):
            lines = (block.shown.strip("\n").splitlines(), printed.splitlines())
            wrong.append(
                f"{place}: another output\n" + "\n".join(difflib.unified_diff(*lines, "shown", "printed", n=1))
            )
            parts += [page[end : block.span[0]], printed + "\n"]
            end = block.span[1]
    return "".join(parts) + page[end:], wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("pages", nargs="*", type=Path, default=PAGES)
    parser.add_argument("--update", action="store_true", help="write what the blocks print into the pages")
    args = parser.parse_args()
    failed = False
    for path in args.pages:
        with tempfile.TemporaryDirectory() as folder:
            page, wrong = run_page(path.resolve(), Path(folder))
        print(f"{path}: {'all as shown' if not wrong else f'{len(wrong)} differ'}", *wrong, sep="\n")
        failed |= any("fails\n" in one for one in wrong) or bool(wrong and not args.update)
        if args.update and wrong:
            path.write_text(page, encoding="utf-8")
        if args.update and path.resolve() == PAGES[0]:
            PICTURE.write_text(draw_picture(), encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
