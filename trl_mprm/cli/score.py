"""`trl-mprm score`: the steps of a solution, scored."""

import argparse

from .arguments import ShowDefaults, add_model_arguments, load_prm, print_table


def add_parser(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("score", help="score the steps of one solution", formatter_class=ShowDefaults)
    command.set_defaults(command=score)
    add_model_arguments(command)
    command.add_argument("--image", action="append", default=[], help="picture, in order; repeat for several")
    command.add_argument("--question", required=True)
    command.add_argument("--step", action="append", required=True, help="a step; repeat for each, in order")


def score(args: argparse.Namespace) -> int:
    prm = load_prm(args)
    scores = prm.score(args.image, args.question, args.step)
    rows = zip(range(1, len(scores) + 1), args.step, scores, strict=True)
    print_table([["step", "text", "P(good)"], *map(list, rows)])
    print(f"\nmean (best-of-N score): {sum(scores) / len(scores):.4f}")
    return 0
