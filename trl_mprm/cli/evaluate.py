"""`trl-mprm evaluate`: a model on a benchmark."""

import argparse
from pathlib import Path
from typing import Any

from ..data.hub import is_hub_id, public_name
from ..evaluation.benchmarks import BENCHMARKS, Benchmark, load_benchmark
from ..evaluation.records import check_comparable, read_scores
from ..text import one_line
from .arguments import (
    add_command,
    add_model_arguments,
    add_url_argument,
    load_scorer,
    nf4,
    positive,
    print_table,
    say,
)


EXAMPLES = [
    ("Measure a model on VisualProcessBench", "trl-mprm evaluate runs/my-prm --output runs/my-prm/visualprocessbench"),
    (
        "Measure it on a copy of the benchmark, and write the figures into its card",
        "trl-mprm evaluate runs/my-prm data/VisualProcessBench --output results --update-card",
    ),
    (
        "Compare it with another model, with a test of the difference",
        "trl-mprm evaluate runs/my-prm --output results --compare other-results/scores.jsonl",
    ),
    (
        "Measure a published text model on ProcessBench",
        "trl-mprm evaluate peiyi9979/math-shepherd-mistral-7b-prm --benchmark processbench \\\n  --dtype bfloat16",
    ),
]


def add_parser(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands,
        "evaluate",
        evaluate,
        "measure a model on a benchmark",
        "Measure how well a model tells good steps from bad ones, or finds the best of several solutions, on a benchmark. "
        "A base model that was never trained to score is measured zero-shot.",
        EXAMPLES,
    )
    add_model_arguments(command, flag=True)
    add_url_argument(command)
    command.add_argument("data", nargs="?", default=argparse.SUPPRESS, help="the same as --data")
    command.add_argument(
        "--benchmark",
        default="visualprocessbench",
        choices=list(BENCHMARKS),
        help="the benchmark: it fixes the format, the measures and, without --data, the dataset on the Hub",
    )
    command.add_argument(
        "--data", help="items in the format of --benchmark: a file, folder or Hub id; default: the published dataset"
    )
    command.add_argument("--image-root", help="folder of the images; default: the folder of the file")
    command.add_argument(
        "--threshold",
        type=_threshold,
        help="score above which a step counts as good: held_out (chosen on other items), oracle (chosen on the same items, "
        "as in the paper) or a number; default: held_out, or 0.5 for the text benchmarks",
    )
    command.add_argument("--batch-size", type=positive, default=8, help="number of solutions scored together")
    command.add_argument("--output", help="folder for scores, reports and a page; an interrupted run continues there")
    command.add_argument("--compare", help="scores.jsonl of another model; tests whether the two models differ")
    command.add_argument(
        "--update-card", action="store_true", help="write the results into the card of a model in a folder"
    )


def _threshold(text: str) -> str | float:
    if text in ("held_out", "oracle"):
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected held_out, oracle or a number, got {text!r}") from None


def evaluate(args: argparse.Namespace) -> int:
    _check_arguments(args)
    # Files of this disk are read and checked before torch is imported; a download is shared between processes.
    on_hub = args.data is None or is_hub_id(args.data)
    benchmark = None if on_hub else _checked_benchmark(args)

    from datetime import timedelta

    from accelerate import PartialState

    from ..evaluation.run import evaluate_model

    state = PartialState(timeout=timedelta(days=1))  # a process waits as long as another downloads or scores
    if benchmark is None:
        with state.main_process_first():
            benchmark = _checked_benchmark(args)
    model, name = _load(args, "auto" if state.num_processes == 1 else {"": state.device})
    metrics = evaluate_model(model, benchmark, _threshold_of(args, benchmark), args.batch_size, args.output)
    if state.is_main_process:
        written = _write(args, benchmark, metrics, name)  # before anything is printed, which may find no reader
        _tell(benchmark, metrics, name)
        say(*written)
    if state.num_processes > 1:
        state.destroy_process_group()
    return 0


def _check_arguments(args: argparse.Namespace) -> None:
    if args.model is None and args.url is None:
        raise ValueError("no model to evaluate: name a Hub id or folder with --model, or a server with --url")
    for flag, value in (("--compare", args.compare), ("--update-card", args.update_card)):
        if value and not args.output:
            raise ValueError(f"{flag} needs a folder for the results: set --output")
    if args.output and Path(args.output).is_file():
        raise ValueError(f"--output {args.output} is a file, expected a folder for scores and reports")
    if args.update_card and not (args.model and Path(args.model, "README.md").is_file()):
        raise FileNotFoundError(
            f"--update-card: {args.model} has no README.md; expected the folder of a trained model"
        )
    if args.compare:
        read_scores(args.compare)


def _threshold_of(args: argparse.Namespace, benchmark: Benchmark) -> float | str:
    return benchmark.entry.threshold if args.threshold is None else args.threshold


def _checked_benchmark(args: argparse.Namespace) -> Benchmark:
    benchmark = load_benchmark(args.benchmark, args.data, args.image_root)
    benchmark.check_measurable(_threshold_of(args, benchmark))
    if args.compare:
        check_comparable(benchmark, args.compare)
    return benchmark


def _load(args: argparse.Namespace, device_map: str | dict) -> tuple[Any, str]:
    """Load the model; return it and its name for reports."""
    if args.url is not None:
        model = load_scorer(args, device_map)
        return model, public_name(args.model) if args.model else model.name
    from ..evaluation.zero_shot import is_base, load_zero_shot

    if args.step_format is None and is_base(args.model):
        quantization = nf4(args.dtype) if args.load_in_4bit else None
        model = load_zero_shot(args.model, quantization, dtype=args.dtype, device_map=device_map)
        return model, f"{public_name(args.model)}, zero-shot"
    return load_scorer(args, device_map), public_name(args.model)


def _write(args: argparse.Namespace, benchmark: Benchmark, metrics: dict[str, Any], name: str) -> list[str]:
    """Write reports and card; return lines about them to print."""
    from ..cards.model_card import add_eval_results
    from ..evaluation.report import write_report

    said = []
    if args.output:
        reports = write_report(args.output, benchmark, name, args.compare)
        said = [f"metrics: {Path(args.output, 'results.json')}", f"scores: {Path(args.output, 'scores.jsonl')}"]
        said += [f"report: {path}" for path in reports]
    if args.update_card:
        title = metrics["benchmark"]["title"]
        said.append(f"card: {add_eval_results(args.model, benchmark.name, title, benchmark.hub_id, metrics)}")
    return said


def _tell(benchmark: Benchmark, metrics: dict[str, Any], name: str) -> None:
    task = benchmark.entry.task
    threshold = f"; {metrics['threshold_protocol']} threshold" if task.labelled else ""
    say(one_line(f"{name} on {metrics['benchmark']['title']}"))
    say(f"{task.summary(metrics)}, figures in percent{threshold}", "")
    for table in task.tables:
        print_table(table(metrics))
        say()
    for reason, count in metrics["benchmark"]["refused"].items():
        say(f"refused: {count} {reason}")
    for item in metrics["benchmark"]["failed"]:
        say(one_line(f"not scored: {item['id']}: {item['error']}"))
