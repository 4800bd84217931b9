"""`trl-mprm demo`: the 10% result in miniature."""

import argparse

from .arguments import ShowDefaults


def add_parser(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("demo", help="the 10%% result in miniature", formatter_class=ShowDefaults)
    command.set_defaults(command=demo)
    command.add_argument("--output", default="runs/demo")
    command.add_argument(
        "--quick", action="store_true", help="one seed, smaller corpus: shows that it runs, is no evidence"
    )
    command.add_argument("--qlora", action="store_true", help="LoRA adapters on a base in 4-bit NF4")


def demo(args: argparse.Namespace) -> int:
    from ..demo.run import run_demo

    run_demo(args.output, quick=args.quick, qlora=args.qlora)
    return 0
