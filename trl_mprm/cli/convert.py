"""`trl-mprm convert`: an internvl_chat checkpoint to the native class."""

import argparse

from .arguments import add_command, print_table, say


EXAMPLES = [
    (
        "Convert VisualPRM-8B",
        "trl-mprm convert OpenGVLab/VisualPRM-8B models/visualprm-8b",
    ),
]


def add_parser(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands,
        "convert",
        convert,
        "convert an InternVL checkpoint (VisualPRM-8B) so that transformers loads it",
        "Convert a checkpoint in the internvl_chat format, such as VisualPRM-8B, to the InternVL class of transformers. The "
        "published format needs code from its repository; the converted model runs without it.",
        EXAMPLES,
    )
    command.add_argument("input", help="internvl_chat checkpoint in safetensors: a Hub id or folder")
    command.add_argument("output", help="folder to write; it must not exist yet")
    command.add_argument(
        "--tokenizer", help="Hub id or folder of a tokenizer with the same ids; default: that of the checkpoint"
    )


def convert(args: argparse.Namespace) -> int:
    from ..models.internvl_chat import convert_internvl_chat

    report = convert_internvl_chat(args.input, args.output, args.tokenizer)
    print_table([["", "converted"], *map(list, report.items())])
    say(f"\nmodel and processor: {args.output}")
    return 0
