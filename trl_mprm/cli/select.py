"""`trl-mprm select`: read files of rollouts, write the kept ones and their evidence."""

import argparse

from tabulate import tabulate

from ..selection.bis import ALPHA
from ..selection.rules import RULES
from ..text import one_line
from .arguments import ShowDefaults, print_table, say


MAX_NAME = 18  # of a source in the table, which then fits 100 columns


def add_parser(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("select", help="keep the rollouts worth training on", formatter_class=ShowDefaults)
    command.set_defaults(command=select)
    command.add_argument("input", nargs="+", help="folder, *.jsonl file(s) or Hub id of annotated rollouts")
    command.add_argument("--output", help="*.jsonl, *.parquet, or a folder (one JSONL per input)")
    command.add_argument("--compare", action="store_true", help="print what every rule would keep, side by side")
    command.add_argument("--report", metavar="FILE", help="also write a page about the selection, FILE.html")
    command.add_argument(
        "--engine", default="local", choices=["local", "ray"], help="where to run; ray: on a Ray cluster"
    )
    rules = "; ".join(f"{rule.name}: {rule.words}" for rule in RULES.values())
    command.add_argument("--rule", default="bis", choices=list(RULES), help=rules)
    command.add_argument("--column", metavar="NAME", help="for the rule `column`: the field of a row to rank by")
    command.add_argument("--fraction", type=float, default=0.1, help="share kept")
    command.add_argument(
        "--by", default="source", choices=["source", "corpus"], help="keep a fraction of each source, or of all rows"
    )
    command.add_argument(
        "--alpha", type=float, default=ALPHA, help="alpha of BIS; the paper: 0.2 for 10%%, 0.05 for 25%%"
    )
    command.add_argument(
        "--ties",
        default="first",
        choices=["first", "hash"],
        help="which of equal scores to keep: first in the file, or by hash",
    )
    command.add_argument("--seed", type=int, default=0, help="seed of the rule `random` and of the hash")
    command.add_argument("--image-root", help="folder of the images; default: the folder of each file")
    command.add_argument("--drop-answer-step", action="store_true", help="do not score a step that states the answer")
    command.add_argument("--strict", action="store_true", help="stop at the first row that cannot be used")
    command.add_argument("--save-to-disk", action="store_true", help="OUTPUT is a folder for datasets.load_from_disk")
    command.add_argument("--push-to-hub", metavar="ORG/NAME", help="also publish the kept rows, with images and card")
    command.add_argument("--license", help="licence on that card; default: that of the source, if it is on the Hub")


def select(args: argparse.Namespace) -> int:
    from ..data.evidence import refused_path, report_path
    from ..selection.files import select_files
    from ..selection.report import report_table

    inputs = args.input if len(args.input) > 1 else args.input[0]
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


def _compare(inputs: str | list[str], args: argparse.Namespace) -> None:
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
        engine=args.engine,
    )
    header, *rows = comparison_table(table)
    say(tabulate(rows, header, disable_numparse=True, colalign=("left", *["right"] * len(table))), "")
