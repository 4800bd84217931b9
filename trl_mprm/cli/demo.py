"""`trl-mprm demo`: the 10% result in miniature."""

import argparse

from .arguments import add_command


EXAMPLES = [
    ("Run it once, on a smaller corpus", "trl-mprm demo --quick"),
    ("Run it in full", "trl-mprm demo --output runs/demo"),
]


def add_parser(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands,
        "demo",
        demo,
        "repeat the paper's result in miniature on a CPU",
        "Make a small world of pictures and questions, train process reward models on all rollouts, on the best tenth, and "
        "on a random tenth, and compare them on a benchmark of the same world.",
        EXAMPLES,
    )
    command.add_argument("--output", default="runs/demo", help="folder to write")
    command.add_argument(
        "--quick",
        action="store_true",
        help="one seed and a smaller corpus, to see that it runs; the figures are no evidence",
    )
    command.add_argument(
        "--full", action="store_true", help="train all weights instead of adapters on a base in 4 bits"
    )


def demo(args: argparse.Namespace) -> int:
    from ..demo.run import run_demo

    run_demo(args.output, quick=args.quick, full=args.full)
    return 0
