"""`trl-mprm annotate`: questions or rollouts in, the scores of their steps out."""

import argparse
from pathlib import Path

from .arguments import add_command, print_table


EXAMPLES = [
    (
        "Let a model behind an OpenAI-compatible server annotate your questions",
        "trl-mprm annotate questions.jsonl --policy http://127.0.0.1:8000 --output annotated.jsonl",
    ),
    (
        "Load the model in this process, with 8 continuations per step",
        "trl-mprm annotate questions.jsonl --policy Qwen/Qwen2.5-VL-7B-Instruct --n 8 \\\n"
        "  --output annotated.parquet",
    ),
    (
        "Spend continuations only on solutions that a selection of 10% can keep",
        "trl-mprm annotate questions.jsonl --policy http://127.0.0.1:8000 --budget bis --fraction 0.1 \\\n"
        "  --output annotated.jsonl",
    ),
]


def add_parser(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands,
        "annotate",
        annotate,
        "score the steps of solutions by Monte Carlo sampling",
        "Score each step of a solution: let a model continue from it several times, and count how many of these "
        "continuations reach the right answer. Questions without a solution are solved first. A run that was interrupted "
        "continues where it stopped when you give the same command again.",
        EXAMPLES,
    )
    command.add_argument(
        "input", nargs="+", help="questions with answers, with or without solutions: a folder, *.jsonl or *.parquet"
    )
    command.add_argument(
        "--policy",
        required=True,
        help="the model that continues the solutions: a Hub id, a folder, or the URL of an OpenAI-compatible server",
    )
    command.add_argument("--output", required=True, help="file to write, *.jsonl or *.parquet")
    command.add_argument(
        "--format",
        default="rows",
        choices=["rows", "visualprm-raw"],
        help="rows: as trl-mprm train reads them; visualprm-raw: as VisualPRM400K-v1.1-Raw has them",
    )
    command.add_argument(
        "--second",
        help="a second model, or a process reward model as a judge; says in the column `agreement` where the two agree",
    )
    command.add_argument(
        "--checker",
        default="math",
        choices=["math", "exact", "choice", "numeric"],
        help="how an answer is compared with the right one: by mathematical value, as text, by the letter of an option, or "
        "as a number",
    )
    command.add_argument("--n", type=int, default=16, help="number of continuations per step")
    command.add_argument("--solutions", type=int, default=4, help="number of solutions for a question that has none")
    _add_budget(command)
    _add_sampling(command)
    command.add_argument("--price", type=float, help="price of a million computed tokens; prints the cost of the run")
    command.add_argument(
        "--engine",
        default="local",
        choices=["local", "ray"],
        help="where to run: in this process, or on a Ray cluster",
    )
    command.add_argument(
        "--workers", type=int, default=8, help="number of solutions that a server continues at the same time"
    )
    command.add_argument("--image-root", help="folder of the images; default: the folder of each file")


def _add_budget(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--budget",
        default="all",
        choices=["all", "bis"],
        help="all: annotate every solution; bis: stop early on solutions that a selection by BIS would not keep",
    )
    command.add_argument(
        "--fraction", type=float, default=0.1, help="with --budget bis: share of each source that the selection keeps"
    )
    command.add_argument("--alpha", type=float, default=0.2, help="with --budget bis: alpha of the selection")
    command.add_argument(
        "--mode",
        default="exact",
        choices=["exact", "confident"],
        help="with --budget bis: give a solution up when it can no longer be kept, or when that is very unlikely",
    )
    command.add_argument(
        "--error",
        type=float,
        default=0.01,
        help="with --mode confident: maximum probability that a solution is given up in error",
    )


def _add_sampling(command: argparse.ArgumentParser) -> None:
    command.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    command.add_argument("--temperature", type=float, default=1.0, help="temperature of the sampling")
    command.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="sample from the most likely tokens that together have this probability",
    )
    command.add_argument("--top-k", type=int, default=50, help="sample from this many most likely tokens; 0: from all")
    command.add_argument(
        "--max-new-tokens",
        type=int,
        default=2048,
        help="maximum length of a continuation; a longer one is not counted",
    )


def annotate(args: argparse.Namespace) -> int:
    from ..annotation.annotate import Plan, annotate_rollouts
    from ..annotation.questions import from_files

    names = (
        "n",
        "solutions",
        "budget",
        "fraction",
        "alpha",
        "mode",
        "error",
        "seed",
        "format",
        "price",
        "engine",
        "workers",
    )
    _, report = annotate_rollouts(
        from_files(args.input if len(args.input) > 1 else args.input[0], args.image_root),
        args.policy,
        args.output,
        Plan(**{name: getattr(args, name) for name in names}),
        checker=args.checker,
        second=args.second,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        max_new_tokens=args.max_new_tokens,
    )
    header = ["source", "rollouts", "kept", "draws with all", "draws", "saved", "tokens"]
    print_table(
        [
            header,
            *(
                [name, c["rollouts"], c["kept"], c["draws_with_all"], c["draws"], c["draws_saved"], c.get("tokens", 0)]
                for name, c in report["sources"].items()
            ),
        ]
    )
    output = Path(args.output)
    print(f"\nannotated rows: {output}\nevidence: {output.with_name(output.stem + '.annotation.json')}")
    for reason, count in report["lost_solutions"].items():
        print(f"lost: {count} {reason}")
    if "cost" in report:
        print(f"cost of this run: {report['cost']:.2f}")
    return 0
