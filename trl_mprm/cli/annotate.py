"""`trl-mprm annotate`: questions or rollouts in, the scores of their steps out."""

import argparse
from pathlib import Path

from .arguments import ShowDefaults, print_table


def add_parser(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "annotate", help="score the steps of rollouts by Monte Carlo", formatter_class=ShowDefaults
    )
    command.set_defaults(command=annotate)
    command.add_argument(
        "input", nargs="+", help="folder, *.jsonl or *.parquet of questions or rollouts, with answers"
    )
    command.add_argument(
        "--policy", required=True, help="model, or URL of an OpenAI-compatible server, that continues"
    )
    command.add_argument("--output", required=True, help="*.jsonl or *.parquet")
    command.add_argument("--format", default="rows", choices=["rows", "visualprm-raw"], help="of the output")
    command.add_argument("--second", help="another policy, or a process reward model as a judge: adds `agreement`")
    command.add_argument("--checker", default="math", choices=["math", "exact", "choice", "numeric"])
    command.add_argument("--n", type=int, default=16, help="continuations per step")
    command.add_argument("--solutions", type=int, default=4, help="sampled of each question that has none")
    command.add_argument("--budget", default="all", choices=["all", "bis"], help="bis: only what a selection can keep")
    command.add_argument("--fraction", type=float, default=0.1, help="share kept of each source")
    command.add_argument("--alpha", type=float, default=0.2, help="of BIS")
    command.add_argument("--mode", default="exact", choices=["exact", "confident"], help="of the budget bis")
    command.add_argument("--error", type=float, default=0.01, help="of the mode confident, per rollout")
    command.add_argument("--seed", type=int, default=0, help="of all draws")
    command.add_argument("--temperature", type=float, default=1.0)
    command.add_argument("--top-p", type=float, default=1.0)
    command.add_argument("--top-k", type=int, default=50, help="0: all tokens")
    command.add_argument("--max-new-tokens", type=int, default=2048, help="a draw that is longer is lost")
    command.add_argument("--price", type=float, help="of a million computed tokens: shows the cost")
    command.add_argument("--engine", default="local", choices=["local", "ray"], help="ray: on a Ray cluster")
    command.add_argument("--workers", type=int, default=8, help="rollouts that a server draws on at once")
    command.add_argument("--image-root", help="folder of the images; default: the folder of each file")


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
