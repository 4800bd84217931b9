"""`trl-mprm card`: the card of a model again, from the record of its training."""

import argparse
import json
from pathlib import Path

from ..data.hub import is_hub_id
from ..files import atomic_output
from .arguments import add_command, say


ADAPTER_CONFIG = "adapter_config.json"


EXAMPLES = [
    (
        "Add a licence and the name on the Hub to the card",
        "trl-mprm card runs/my-prm --license apache-2.0 --repo org/my-prm",
    ),
    ("Look at the card without changing the folder", "trl-mprm card runs/my-prm --output card.md"),
]


def add_parser(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands,
        "card",
        card,
        "write the model card of a trained model again",
        "Write the model card again from the record of the training (model_card.json), for example with a licence or with "
        "the name under which the model will be published.",
        EXAMPLES,
    )
    command.add_argument("model", help="folder of a trained model, or with --output the path of its model_card.json")
    command.add_argument("--license", help="licence of the weights, as the Hub names it, e.g. apache-2.0")
    command.add_argument("--repo", metavar="ORG/NAME", help="name on the Hub under which the model will be published")
    command.add_argument("--output", help="file to write; default: README.md in the folder of the model")


def card(args: argparse.Namespace) -> int:
    from ..cards.model_card import read_record, render_card, write_card

    changes = {"license": args.license, "repo": args.repo, "name": args.repo and args.repo.rsplit("/", 1)[-1]}
    record = read_record(args.model) | {key: value for key, value in changes.items() if value is not None}
    if args.output:
        with atomic_output(args.output) as part:
            part.write_text(str(render_card(record)), encoding="utf-8")
    say(f"card: {args.output or write_card(args.model, record)}")
    if args.output:
        return 0
    base = _local_base(Path(args.model))
    if base is not None:
        say(
            f"not ready to publish: {Path(args.model, ADAPTER_CONFIG)} names the base {base}, a folder of this machine; "
            "set base_model_name_or_path there to the base's id on the Hub first"
        )
    else:
        say(f"publish: hf upload {record['repo'] or 'ORG/NAME'} {args.model} . --exclude 'checkpoint-*'")
    return 0


def _local_base(folder: Path) -> str | None:
    """The base that an adapter names, where it is a folder and no id on the Hub."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return None
    base = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    return base if isinstance(base, str) and not is_hub_id(base) else None
