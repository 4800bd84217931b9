"""`trl-mprm card`: the card of a model again, from the record of its training."""

import argparse

from ..files import atomic_output


def add_parser(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("card", help="write the model card again, from the record of the training run")
    command.set_defaults(command=card)
    command.add_argument("model", help="folder of a trained model, or its model_card.json with --output")
    command.add_argument("--license", help="licence of the weights, as a Hub identifier")
    command.add_argument("--repo", metavar="ORG/NAME", help="where the model will be published")
    command.add_argument("--output", help="write the card to this file; default: README.md of the folder")


def card(args: argparse.Namespace) -> int:
    from ..cards.model_card import read_record, render_card, write_card

    changes = {"license": args.license, "repo": args.repo, "name": args.repo and args.repo.rsplit("/", 1)[-1]}
    record = read_record(args.model) | {key: value for key, value in changes.items() if value is not None}
    if args.output:
        with atomic_output(args.output) as part:
            part.write_text(str(render_card(record)), encoding="utf-8")
    print(f"card: {args.output or write_card(args.model, record)}")
    if not args.output:
        print(f"publish: hf upload {record['repo'] or 'ORG/NAME'} {args.model} . --exclude 'checkpoint-*'")
    return 0
