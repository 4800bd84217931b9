"""`trl-mprm convert`: an internvl_chat checkpoint to the native class."""

import argparse

from .arguments import print_table, say


def add_parser(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("convert", help="internvl_chat checkpoint (VisualPRM-8B) to the native class")
    command.set_defaults(command=convert)
    command.add_argument("input", help="folder or Hub id of an internvl_chat checkpoint in safetensors")
    command.add_argument("output", help="folder to write; it must not exist")
    command.add_argument("--tokenizer", help="native tokenizer with the same ids; default: the checkpoint's own")


def convert(args: argparse.Namespace) -> int:
    from ..models.internvl_chat import convert_internvl_chat

    report = convert_internvl_chat(args.input, args.output, args.tokenizer)
    print_table([["", "converted"], *map(list, report.items())])
    say(f"\nmodel and processor: {args.output}")
    return 0
