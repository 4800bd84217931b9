"""`trl-mprm select`: read files of rollouts, write the kept ones and their evidence."""

import argparse

from tabulate import tabulate

from ..data.shards import Paths
from ..selection.bis import ALPHA
from ..selection.rules import RULES
from ..text import one_line
from .arguments import add_command, print_table, say


MAX_NAME = 18  # of a source in the table, which then fits 100 columns


EXAMPLES = [
    (
        "Keep the best tenth of each source, and write a page about the selection",
        "trl-mprm select rollouts --output kept --report kept.html",
    ),
    ("Look at what each rule would keep, and write nothing", "trl-mprm select rollouts --compare"),
    (
        "Keep a quarter of a dataset on the Hub, with the paper's alpha",
        "trl-mprm select OpenGVLab/VisualPRM400K-v1.1-Raw --fraction 0.25 --alpha 0.05 \\\n  --output kept-25",
    ),
    (
        "Rank by a number of your own in each row",
        "trl-mprm select rows.jsonl --rule column --column quality --output kept.jsonl",
    ),
]


def add_parser(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands,
        "select",
        select,
        "keep the rollouts worth training on",
        "Rank annotated rollouts by their step scores alone, and keep the top fraction of each source. Beside the kept rows, "
        "selection.json has the counts and the cut of each source, and refused.jsonl "
        "lists every row that cannot be used, with the reason.",
        EXAMPLES,
    )
    command.add_argument(
        "input", nargs="+", help="annotated rollouts: folders or files (*.jsonl, *.parquet), or a dataset on the Hub"
    )
    command.add_argument(
        "--output", help="where the kept rows go: *.jsonl, *.parquet, or a folder with a file per input"
    )
    command.add_argument("--compare", action="store_true", help="print a table of what each rule would keep")
    _add_rule(command)
    command.add_argument(
        "--split", default="train", help="split to read of a dataset on the Hub, or of a folder with a file per split"
    )
    command.add_argument("--image-root", help="folder of the images; default: the folder of each file")
    command.add_argument(
        "--drop-answer-step", action="store_true", help="leave out a last step that states the answer"
    )
    command.add_argument(
        "--strict", action="store_true", help="stop with an error if a row cannot be used, and write nothing"
    )
    command.add_argument("--report", metavar="FILE", help="also write a page about the selection, *.html")
    command.add_argument(
        "--engine",
        default="local",
        choices=["local", "ray"],
        help="where to run: on this machine, or on a Ray cluster",
    )
    command.add_argument(
        "--save-to-disk", action="store_true", help="write OUTPUT as a folder for datasets.load_from_disk"
    )
    command.add_argument(
        "--push-to-hub",
        metavar="ORG/NAME",
        help="also publish the kept rows as a dataset on the Hub, with images and a card",
    )
    command.add_argument(
        "--license", help="licence on that card; default: the licence of the source, if it is on the Hub"
    )


def _add_rule(command: argparse.ArgumentParser) -> None:
    rules = "; ".join(f"{rule.name}: {rule.words}" for rule in RULES.values())
    command.add_argument("--rule", default="bis", choices=list(RULES), help=rules)
    command.add_argument("--column", metavar="NAME", help="with --rule column: the field of a row to rank by")
    command.add_argument("--fraction", type=float, default=0.1, help="share to keep: 0.1 keeps a tenth")
    command.add_argument(
        "--by",
        default="source",
        choices=["source", "corpus"],
        help="keep this share of each source, or of all rows together",
    )
    command.add_argument(
        "--alpha",
        type=float,
        default=ALPHA,
        help="alpha of BIS; the paper takes 0.2 to keep 10%% and 0.05 to keep 25%%",
    )
    command.add_argument(
        "--ties",
        default="first",
        choices=["first", "hash"],
        help="which of several equal scores to keep: the first in the file, or those that a seeded hash picks",
    )
    command.add_argument("--seed", type=int, default=0, help="seed of --rule random and of --ties hash")


def select(args: argparse.Namespace) -> int:
    from ..data.evidence import refused_path, report_path
    from ..selection.files import select_files
    from ..selection.report import report_table

    inputs: Paths = args.input if len(args.input) > 1 else args.input[0]
    if args.compare:
        _compare(inputs, args)
    if args.output is None:
        if args.compare and not args.report:
            return 0
        raise ValueError("expected --output, where the kept rollouts go (or --compare alone, to keep none)")
    report = select_files(
        inputs,
        args.output,
        args.rule,
        fraction=args.fraction,
        alpha=args.alpha,
        ties=args.ties,
        seed=args.seed,
        by=args.by,
        column=args.column,
        image_root=args.image_root,
        drop_answer_step=args.drop_answer_step,
        split=args.split,
        strict=args.strict,
        save_to_disk=args.save_to_disk,
        push_to_hub=args.push_to_hub,
        license=args.license,
        engine=args.engine,
        page=args.report,
    )
    header, *rows = report_table(report)
    print_table([header, *([_short(row[0]), *row[1:]] for row in rows)])
    say(f"\nkept rollouts: {args.output}\nevidence: {report_path(args.output, args.save_to_disk)}")
    for reason, count in report["total"]["refused"].items():
        say(f"refused: {count} {reason} (see {refused_path(args.output, args.save_to_disk)})")
    if args.report:
        say(f"page: {args.report}")
    if args.push_to_hub:
        say(f"published: dataset {args.push_to_hub}")
    return 0


def _short(name: str) -> str:
    name = one_line(name)
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"


def _compare(inputs: Paths, args: argparse.Namespace) -> None:
    from ..selection.comparison import compare_rules, comparison_table

    table = compare_rules(
        inputs,
        fraction=args.fraction,
        alpha=args.alpha,
        ties=args.ties,
        seed=args.seed,
        by=args.by,
        image_root=args.image_root,
        drop_answer_step=args.drop_answer_step,
        split=args.split,
        engine=args.engine,
    )
    header, *rows = comparison_table(table)
    say(tabulate(rows, header, disable_numparse=True, colalign=("left", *["right"] * len(table))), "")
