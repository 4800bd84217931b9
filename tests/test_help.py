"""The help of every command: quick, complete, and with examples that are parsed and, where they are cheap, run."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from trl_mprm.cli import COMMANDS, _parser, main
from trl_mprm.cli.fields import train_fields
from trl_mprm.cli.preflight import check_train
from trl_mprm.demo import EXAMPLE, MINIATURE


COMMAND_NAMES = [*COMMANDS, None]  # None: trl-mprm --help

# Examples that need no model on a server, no download and no minutes.
RUN = [
    "trl-mprm select rollouts --output kept --report kept.html",
    "trl-mprm select rollouts --compare",
    "trl-mprm select rows.jsonl --rule column",
    "trl-mprm score runs/my-prm --image tiles.png",
    "trl-mprm score runs/my-prm solutions.jsonl",
    "trl-mprm export runs/my-prm runs/my-prm-vllm",
    "trl-mprm recipes",
]


def help_of(command: str | None, capsys) -> str:
    argv = [] if command is None else [command]
    try:
        assert main([*argv, "--help"]) == 0
    except SystemExit as end:
        assert end.code == 0
    return capsys.readouterr().out


def examples_of(command: str | None, capsys) -> list[list[str]]:
    """The words of the examples, without `trl-mprm`."""
    text = help_of(command, capsys).partition("\nexamples:\n")[2].replace("\\\n", "")
    lines = [line for line in text.splitlines() if line.startswith("    ")]
    assert lines and all(line.startswith("    trl-mprm ") for line in lines)
    return [shlex.split(line)[1:] for line in lines]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The files that the examples name."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": "?", "completions": ["a", "b"], "labels": [1, 0], "quality": 0.5},
        {"prompt": "?", "completions": ["a"], "labels": [1], "quality": 0.75},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "kept").mkdir()
    for name in ("rollouts/source.jsonl", "rows.jsonl", "solutions.jsonl"):
        (tmp_path / name).write_text(text)
    (tmp_path / "recipe.yaml").write_text("model_name_or_path: org/name\ndataset_name: org/rows\n")
    shutil.copy(EXAMPLE, tmp_path / "tiles.png")
    shutil.copytree(MINIATURE, tmp_path / "runs" / "my-prm")
    return tmp_path


@pytest.mark.parametrize("command", COMMAND_NAMES)
def test_the_examples_are_commands(command, folder, capsys):
    for name, *words in examples_of(command, capsys):
        assert command in (None, name)
        if name == "train":
            check_train(words)
        else:
            _parser(name).parse_args([name, *words])


def test_the_cheap_examples_run(folder, capsys):
    examples = [words for command in COMMANDS for words in examples_of(command, capsys)]
    commands = [shlex.join(["trl-mprm", *words]) for words in examples]
    chosen = [
        words
        for words, text in zip(examples, commands, strict=True)
        if text.startswith(tuple(RUN)) and "--check" not in words
    ]
    assert len(chosen) >= len(RUN)
    for words in chosen:
        assert main(words) == 0, words
    assert {"kept.html", "scored.jsonl", "my-recipe.yaml"} <= {path.name for path in folder.iterdir()}


def test_help_is_quick_because_it_imports_no_large_library():
    script = (
        "import sys\nfrom trl_mprm.cli import COMMANDS, main\n"
        "for command in [None, *COMMANDS]:\n"
        "    try:\n        main(['--help'] if command is None else [command, '--help'])\n"
        "    except SystemExit as end:\n        assert end.code == 0\n"
        "assert not {'torch', 'transformers', 'trl', 'datasets', 'accelerate'} & sys.modules.keys()"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(command, capsys):
    text = help_of(command, capsys)
    options = re.findall(r"^  (-[^\n]*)\n?((?:\n? {6,}[^\n]*)*)", text, re.MULTILINE)
    assert options
    for flag, explanation in options:
        assert explanation.strip() or re.search(r"\S {2,}\S", flag), flag


def test_train_names_our_fields_first_then_those_of_trl_and_transformers(capsys):
    text = help_of("train", capsys)
    places = [text.index(f"\n  --{name}") for name in ("fraction", "loss_type", "lora_r", "deepspeed")]
    assert places == sorted(places)
    told = re.findall(r"^  --(\w+)", text, re.MULTILINE)
    assert sorted(told) == sorted([*train_fields(), "config", "smoke"])
