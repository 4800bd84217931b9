"""Helpers for several commands: arguments, tables, loading a model."""

import argparse
import os
import sys
import textwrap
from collections.abc import Callable, Sequence

from tabulate import tabulate

from ..text import one_line, plain


WIDTH = 100


class Help(argparse.RawDescriptionHelpFormatter):
    """Keep the lines of the examples as they are, and name the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        told = "default: " in text or action.default is argparse.SUPPRESS
        has_one = action.default not in (None, []) and action.default is not False
        return f"{text} (default: %(default)s)" if action.option_strings and has_one and not told else text


def add_command(
    commands: argparse._SubParsersAction,
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    about: str,
    examples: Sequence[tuple[str, str]],
) -> argparse.ArgumentParser:
    """
    Add a command to the parser of `trl-mprm`.

    Args:
        run (`Callable`): Takes the parsed arguments and returns the exit code.
        summary (`str`): Its line in `trl-mprm --help`.
        about (`str`): The first paragraph of its own help.
        examples (`Sequence[tuple[str, str]]`): The last paragraph of its own help: pairs of a sentence and a command.
    """
    command = commands.add_parser(
        name, help=summary, description=filled(about), epilog=told_examples(examples), formatter_class=Help
    )
    command.set_defaults(command=run)
    return command


def filled(text: str) -> str:
    return textwrap.fill(text, 79)


def told_examples(examples: Sequence[tuple[str, str]]) -> str:
    """Write examples as the end of a help text. A command of several lines has a backslash before each line end."""
    lines = ["examples:"]
    for words, example in examples:
        lines += [f"  {words}:", textwrap.indent(example, "    ")]
    return "\n".join(lines)


def add_model_arguments(command: argparse.ArgumentParser, flag: bool = False) -> None:
    model = "the process reward model: a Hub id, or the folder that a training wrote"
    if flag:
        command.add_argument("model", nargs="?", default=argparse.SUPPRESS, help="the same as --model")
        command.add_argument("--model", help=model)
    else:
        command.add_argument("model", help=model)
    command.add_argument(
        "--step-format",
        help="prompt layout of a model that was trained elsewhere, e.g. math-shepherd; default: the layout in the "
        "model's own files, or the one known for its Hub id",
    )
    command.add_argument("--base-model", help="the base model of a LoRA adapter, if it has moved since the training")
    command.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16", "float16"],
        help="number format of the weights; bfloat16 halves the memory on a GPU",
    )
    command.add_argument("--load-in-4bit", action="store_true", help="load the weights in 4 bits, as QLoRA trains")


def add_url_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--url", help="score with a model on this server (trl-mprm serve or vLLM); MODEL is then its name there"
    )


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def say(*lines: str) -> None:
    """
    Print text safely: replace control characters and characters that the terminal's encoding lacks, and ignore a reader
    that has gone, as in `| head -1`.
    """
    if sys.stdout is None:  # closed by who started us
        return
    encoding = sys.stdout.encoding or "utf-8"
    text = "\n".join(map(plain, lines))
    try:
        print(text.encode(encoding, "replace").decode(encoding), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_table(rows: list[list]) -> None:
    """Format a table, header first, shortening the first column if the table would exceed 100 columns."""
    rows = [[one_line(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    table = _table(rows)
    too_wide = max(map(len, table.splitlines())) - WIDTH
    if too_wide > 0:
        longest = max(len(str(row[0])) for row in rows)
        room = max(12, longest - too_wide)
        table = _table(
            [[str(row[0])[: room - 1] + "…" if len(str(row[0])) > room else row[0], *row[1:]] for row in rows]
        )
    say(table)


def _table(rows: list[list]) -> str:
    return tabulate(rows[1:], headers=rows[0], floatfmt=".4g")


def load_scorer(args: argparse.Namespace, device_map: str | dict = "auto"):
    """Load the model that the arguments name, behind the server of `--url` or in this process."""
    if args.url is None:
        return load_prm(args, device_map)
    from ..serving.client import RemoteProcessRewardModel

    return RemoteProcessRewardModel(args.url, args.model)


def load_prm(args: argparse.Namespace, device_map: str | dict = "auto"):
    from ..scoring import ProcessRewardModel

    return ProcessRewardModel.from_pretrained(
        args.model,
        base_model=args.base_model,
        step_format=args.step_format,
        quantization_config=nf4(args.dtype) if args.load_in_4bit else None,
        dtype=args.dtype,
        device_map=device_map,
    )


def nf4(dtype: str):
    from trl import ModelConfig, get_quantization_config

    return get_quantization_config(ModelConfig(load_in_4bit=True, dtype=dtype))
