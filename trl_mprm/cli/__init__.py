"""`trl-mprm COMMAND`: arguments in, the library works, one table out."""

import argparse
import logging
import sys
from importlib import import_module

from .. import __version__
from ..text import one_line
from .arguments import Help, filled, told_examples


# Command: its module. Only the one that is asked for is imported: `select` of a few files is done before others are.
COMMANDS = {
    name: name
    for name in ("select", "annotate", "train", "score", "evaluate", "serve", "card", "convert", "recipes", "demo")
} | {"export": "serve"}


EXAMPLES = [
    ("Keep the rollouts worth training on", "trl-mprm select rollouts --output kept"),
    (
        "Train on them",
        "trl-mprm train --dataset_name kept --model_name_or_path Qwen/Qwen2.5-VL-3B-Instruct \\\n"
        "  --output_dir runs/my-prm",
    ),
    ("Score solutions", "trl-mprm score runs/my-prm solutions.jsonl --output scored.jsonl"),
]


def main(argv: list[str] | None = None) -> int:
    """
    Run one command; return its exit code: 0, or 2 after one line that says what was wrong (130 after Ctrl-C).

    Examples:
    ```python
    >>> from trl_mprm.cli import main
    >>> main(["score", "no/such-folder/anywhere", "--question", "2+2?", "--step", "4"])
    2

    ```
    """
    argv = sys.argv[1:] if argv is None else argv
    # Tells on import that a kernel is missing which we would switch off anyway, see models.loading.keep_4bit_gradients_on_cpu.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        if argv[:1] == ["train"]:  # TrlParser has its own flags, taken from the dataclasses
            return import_module(".train", __name__).train(argv[1:])
        args = _parser(*argv[:1]).parse_args(argv)
        return args.command(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130  # what a shell makes of Ctrl-C


def _parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of all commands; of one alone, where it is named."""
    parser = argparse.ArgumentParser(
        "trl-mprm",
        description=filled(
            "Select rollouts, train a multimodal process reward model on them, score, evaluate and serve it."
        ),
        epilog=told_examples(EXAMPLES) + "\n\ntrl-mprm COMMAND --help shows the options of a command, and examples.",
        formatter_class=Help,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module in [COMMANDS[command]] if command in COMMANDS else dict.fromkeys(COMMANDS.values()):
        import_module(f".{module}", __name__).add_parser(commands)
    return parser
