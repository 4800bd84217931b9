"""`trl-mprm score`: score the steps of solutions, and rank the solutions of a question."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..data.aggregates import AGGREGATES
from ..data.splitting import SPLITS, split_steps
from ..files import atomic_output
from .arguments import add_command, add_model_arguments, add_url_argument, load_scorer, positive, print_table, say


SHOWN = 20  # solutions in the table; all are in the JSONL


EXAMPLES = [
    (
        "Score the steps of one solution",
        'trl-mprm score runs/my-prm --image tiles.png --question "How many tiles are red?" \\\n'
        '  --step "Two tiles are red." --step "Answer: 2"',
    ),
    (
        "Rank two solutions",
        'trl-mprm score runs/my-prm --image tiles.png --question "How many tiles are red?" \\\n'
        '  --candidate "Answer: 2" --candidate "Answer: 3"',
    ),
    ("Score a file of solutions", "trl-mprm score runs/my-prm solutions.jsonl --output scored.jsonl"),
    (
        "Score with a model on a server",
        "trl-mprm score prm solutions.jsonl --url http://127.0.0.1:8000 --output scored.jsonl",
    ),
]


def add_parser(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands,
        "score",
        score,
        "score the steps of solutions, and rank solutions",
        "Give each step of a solution the probability that it is good, and rank the solutions of a question. The solutions "
        "come from a file, from standard input, or from the command line.",
        EXAMPLES,
    )
    add_model_arguments(command)
    add_url_argument(command)
    command.add_argument(
        "input",
        nargs="?",
        help="solutions to score: a file of rows, annotated or not, as `select` reads them, or - for JSONL on standard "
        "input; a row with `candidates` holds several solutions of one question",
    )
    command.add_argument("--question", help="the text of a question, in place of INPUT")
    command.add_argument(
        "--image", action="append", default=[], help="a picture of the question; repeat for several, in their order"
    )
    command.add_argument(
        "--step", action="append", default=[], help="a step of the solution; repeat for each step, in order"
    )
    command.add_argument(
        "--candidate", action="append", default=[], help="a whole solution; repeat for each solution to rank"
    )
    command.add_argument(
        "--split", default="blank_line", choices=SPLITS, help="how to split a whole solution into steps"
    )
    command.add_argument(
        "--aggregate",
        default="mean",
        choices=AGGREGATES,
        help="how the scores of its steps make the score of a solution",
    )
    command.add_argument("--image-root", help="folder of the images; default: the folder of INPUT")
    command.add_argument("--batch-size", type=positive, default=8, help="number of solutions scored together")
    command.add_argument(
        "--output",
        help="file to write, *.jsonl: the rows with `step_scores`, `score` and their `rank` within the question",
    )
    command.add_argument("--json", action="store_true", help="print these rows in place of a table")


def score(args: argparse.Namespace) -> int:
    _check(args)
    solutions = _solutions(args)
    records, refused = _scored(load_scorer(args), solutions, args)
    lines = [json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records]
    if args.output:
        with atomic_output(args.output) as part:
            part.write_text("".join(lines), encoding="utf-8")
    if args.json:
        sys.stdout.writelines(lines)
    elif len(records) == 1:
        (record,) = records
        steps = zip(map(_shown, record["completions"]), record["step_scores"], strict=True)
        print_table([["step", "text", "P(good)"], *([number, *step] for number, step in enumerate(steps, 1))])
        say(f"\n{'mean (best-of-N score)' if args.aggregate == 'mean' else args.aggregate}: {record['score']:.4f}")
    else:
        _print_ranking(records)
    for reason, (place, *others) in refused.items():
        print(f"refused: {1 + len(others)} {reason}, the first at {place}", file=sys.stderr)
    if args.output and not args.json:
        say(f"\nscores: {args.output}")
    return 0


def _check(args: argparse.Namespace) -> None:
    if (args.input is None) == (args.question is None):
        raise ValueError("expected solutions: either INPUT (a file, or -), or --question with --step or --candidate")
    if args.question is not None and bool(args.step) == bool(args.candidate):
        raise ValueError("--question needs a solution: either --step for each step, or --candidate for each solution")
    if args.input is not None and (args.step or args.candidate or args.image):
        raise ValueError("--step, --candidate and --image belong to --question: the rows of INPUT have their own")
    if args.output and not args.output.endswith(".jsonl"):
        raise ValueError(f"--output is {args.output}, expected a name that ends in .jsonl")
    if args.input not in (None, "-") and not Path(args.input).exists():
        raise FileNotFoundError(f"{args.input}: no such file, expected one of solutions, or - for standard input")


def _solutions(args: argparse.Namespace) -> list:
    from ..data.solutions import Solution, read_solutions, solutions_of

    if args.input == "-":
        return list(solutions_of(sys.stdin.buffer, "standard input", args.image_root, args.split))
    if args.input is not None:
        return list(read_solutions(args.input, args.image_root, args.split))
    candidates = [split_steps(text, args.split) for text in args.candidate] or [args.step]
    rows = [{"prompt": args.question, "completions": steps, "images": args.image} for steps in candidates]
    return [Solution(str(number), row, row) for number, row in enumerate(rows)]


def _scored(prm, solutions: list, args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """Score solutions; return a record of each that can be scored, and by reason the places of those that cannot."""
    from ..data.rows import Reason, Refused, question_key
    from ..rewards import kind_of, score_rows

    rows: list[Any] = [
        one.row if isinstance(one.row, Refused) else one.row | {"rollout_id": one.place} for one in solutions
    ]
    results = score_rows(lambda batch: prm.score_batch(batch, args.batch_size), rows)
    refused: dict[str, list[str]] = {}
    errors: list[ValueError] = []
    records: list[dict[str, Any]] = []
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for solution, row, result in zip(solutions, rows, results, strict=True):
        if result.error is not None or not result.steps:
            errors.append(result.error or Refused(Reason.EMPTY_STEPS))
            reason = str(errors[-1].reason) if isinstance(errors[-1], Refused) else kind_of(errors[-1])
            refused.setdefault(reason, []).append(solution.place)
            continue
        scored = {"step_scores": result.scores, "score": AGGREGATES[args.aggregate](result.scores)}
        records.append({**solution.record, "completions": result.steps, **scored})
        groups.setdefault(question_key(row["prompt"], row["images"]), []).append(records[-1])
    if not records:
        if len(errors) == 1:
            raise errors[0]
        reasons = "; ".join(f"{len(places)} {reason}" for reason, places in refused.items()) or "there are none"
        raise ValueError(f"none of {len(solutions)} solutions can be scored: {reasons}")
    for group in groups.values():
        for rank, record in enumerate(sorted(group, key=lambda record: -record["score"]), 1):
            record["rank"] = rank
    return records, refused


def _print_ranking(records: list[dict[str, Any]]) -> None:
    """Put the best first if all answer one question; else keep the order."""
    numbered = list(enumerate(records, 1))
    if sorted(record["rank"] for record in records) == [number for number, _ in numbered]:
        numbered.sort(key=lambda pair: pair[1]["rank"])
    rows = []
    for number, record in numbered[:SHOWN]:
        worst = min(range(len(record["step_scores"])), key=record["step_scores"].__getitem__)
        lowest = f"{worst + 1}: {_shown(record['completions'][worst], 40)}"
        rows.append(
            [record["rank"], number, len(record["step_scores"]), record["score"], record["step_scores"][worst], lowest]
        )
    print_table([["rank", "solution", "steps", "score", "lowest P(good)", "of step"], *rows])
    if len(records) > SHOWN:
        say(f"... and {len(records) - SHOWN:,} more: --output or --json has all")


def _shown(text: str, width: int = 70) -> str:
    """A text on one line of a terminal."""
    text = "".join(character if character.isprintable() else " " for character in " ".join(text.split()))
    return text if len(text) <= width else text[: width - 3] + "..."
