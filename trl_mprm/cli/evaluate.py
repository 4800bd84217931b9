"""`trl-mprm evaluate`: a model on a benchmark."""

import argparse
from pathlib import Path

from ..evaluation.benchmarks import BENCHMARKS, load_benchmark
from .arguments import ShowDefaults, add_model_arguments, add_url_argument, load_scorer, positive, print_table


def add_parser(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("evaluate", help="measure on a benchmark", formatter_class=ShowDefaults)
    command.set_defaults(command=evaluate)
    add_model_arguments(command, flag=True)
    add_url_argument(command)
    command.add_argument("data", nargs="?", default=argparse.SUPPRESS, help="the same as --data")
    command.add_argument(
        "--benchmark",
        default="visualprocessbench",
        choices=list(BENCHMARKS),
        help="format of the data, and the dataset on the Hub unless --data names another",
    )
    command.add_argument("--data", help="file, folder or Hub id; default: the published dataset of --benchmark")
    command.add_argument("--image-root", help="folder of the images; default: the folder of the file")
    command.add_argument(
        "--threshold", type=_threshold, help="held_out, oracle, or a number; default: held_out, 0.5 for the text ones"
    )
    command.add_argument("--batch-size", type=positive, default=8)
    command.add_argument("--output", help="folder for scores and reports; a run that was interrupted continues there")
    command.add_argument("--compare", help="scores.jsonl of another model: test whether the two differ")
    command.add_argument("--update-card", action="store_true", help="write the results into the card of a local model")


def _threshold(text: str) -> str | float:
    if text in ("held_out", "oracle"):
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected held_out, oracle or a number, got {text!r}") from None


def evaluate(args: argparse.Namespace) -> int:
    from datetime import timedelta

    from accelerate import PartialState

    from ..cards.model_card import add_eval_results
    from ..data.hub import public_name
    from ..evaluation.report import write_report
    from ..evaluation.run import evaluate_model

    if args.model is None and args.url is None:
        raise ValueError("no model to evaluate: name a Hub id or folder with --model, or a server with --url")
    for flag, value in (("--compare", args.compare), ("--update-card", args.update_card)):
        if value and not args.output:
            raise ValueError(f"{flag} needs a folder for the results: set --output")
    if args.output and Path(args.output).is_file():
        raise ValueError(f"--output {args.output} is a file, expected a folder for scores and reports")
    state = PartialState(timeout=timedelta(days=1))  # a process waits as long as another downloads or scores
    with state.main_process_first():  # one download for all processes
        benchmark = load_benchmark(args.benchmark, args.data, args.image_root)
    threshold = benchmark.entry.threshold if args.threshold is None else args.threshold
    prm = load_scorer(args, "auto" if state.num_processes == 1 else {"": state.device})
    metrics = evaluate_model(prm, benchmark, threshold, args.batch_size, args.output)
    if state.is_main_process:
        for table in benchmark.entry.task.tables:
            print_table(table(metrics))
            print()
        for reason, count in metrics["benchmark"]["refused"].items():
            print(f"refused: {count} {reason}")
        for item in metrics["benchmark"]["failed"]:
            print(f"not scored: {item['id']}: {item['error']}")
        if args.output:
            reports = write_report(
                args.output, benchmark, public_name(args.model) if args.model else prm.name, args.compare
            )
            print(f"\nmetrics: {Path(args.output) / 'results.json'}\nscores: {Path(args.output) / 'scores.jsonl'}")
            print("\n".join(f"report: {path}" for path in reports))
        if args.update_card:
            card = add_eval_results(
                args.model, benchmark.name, metrics["benchmark"]["title"], benchmark.hub_id, metrics
            )
            print(f"card: {card}")
    if state.num_processes > 1:
        state.destroy_process_group()
    return 0
