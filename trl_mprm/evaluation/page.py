"""
Write a page about an evaluation, in one HTML file that loads nothing.

It is made of the items of a [`Benchmark`], the lines of `scores.jsonl`, and the results:

    {"id": "DynaMath:0", "labels": [1, -1], "scores": [0.97, 0.08], ...}

The page shows the overall figures, the sources, calibration, and single solutions: the picture, the question, and each
step with its score in colour beside the human label, the first error marked. Filters by source and verdict are pure CSS.
"""

import hashlib
from collections.abc import Sequence
from math import ceil
from statistics import median
from typing import Any

import numpy as np

from ..cards.measures import MEASURES
from ..data.aggregates import AGGREGATES
from ..pages import colour, render_page, thumbnail
from ..text import plain
from .benchmarks import Benchmark
from .step_counts import CALIBRATION_BINS, calibration_bins
from .tasks import GOOD_VERDICTS, Task, misjudged_step


MAX_CARDS = 60

MAX_SOLUTIONS = 8  # per question

MAX_STEPS = 40

MAX_TEXT = 1500

MAX_IMAGES = 4

THUMBNAIL = 400  # pixels on the longer side

MAX_LISTED = 50  # refused records and failed items

VERDICTS = {
    "found": "first error found",
    "clean": "no error, and none reported",
    "other": "error reported at another step",
    "missed": "error missed",
    "false": "false alarm",
    "correct": "correct answer",
    "wrong": "wrong answer",
}


def evaluation_page(
    benchmark: Benchmark, records: Sequence[dict[str, Any]], results: dict[str, Any], model_name: str
) -> str:
    """
    Render the page.

    Args:
        benchmark ([`Benchmark`]):
            The benchmark, with its questions, steps and images.
        records (`Sequence[dict]`):
            Lines of `scores.jsonl`.
        results (`dict`):
            Result of [`evaluate_model`].
        model_name (`str`):
            Name of the model.

    Returns:
        `str`: HTML. At most 60 questions are shown, the same number from each source: up to half are the worst judged
        (first those with a wrong verdict, then by the share of steps on the wrong side of the threshold, then by the
        distance of the scores from the labels), the others are drawn by a hash of their name. Pictures are embedded
        thumbnails.
    """
    items = {item["id"]: item for item in benchmark.items}
    task = benchmark.entry.task
    scored = [record for record in records if record["scores"] is not None]
    threshold = _threshold(results) if task.labelled else None
    cards = _cards([(items[record["id"]], record) for record in scored], task, threshold)
    return render_page(
        "evaluation.html",
        model=model_name,
        title=results["benchmark"]["title"],
        summary=task.summary(results),
        report=results["benchmark"],
        results=results,
        headlines={key: MEASURES[key] for key in benchmark.entry.headlines},
        columns=task.source_columns,
        barred=next(key for _, key in task.source_columns if not key.startswith("n_")),
        threshold=threshold,
        sources=list(results["sources"].items()),
        calibration=None if threshold is None else _calibration(scored),
        cards=cards,
        shown_sources=list(dict.fromkeys(card["source"] for card in cards)),
        shown_verdicts=[name for name in VERDICTS if any(name in card["verdicts"] for card in cards)],
        verdicts=VERDICTS,
        good_verdicts=GOOD_VERDICTS,
        n_questions=len({(record["source"], record[task.card_of]) for record in scored}),
        max_listed=MAX_LISTED,
    )


def _threshold(results: dict[str, Any]) -> float:
    """The threshold of the run, or the median over folds if each fold has its own."""
    threshold = results["threshold"]
    return median(threshold) if isinstance(threshold, list) else threshold


def _cards(pairs: list[tuple[dict, dict]], task: Task, threshold: float | None) -> list[dict[str, Any]]:
    questions: dict[str, dict[str, list[tuple[dict, dict]]]] = {}
    for item, record in pairs:
        questions.setdefault(record["source"], {}).setdefault(record[task.card_of], []).append((item, record))
    each = max(1, MAX_CARDS // max(1, len(questions)))
    cards = []
    for source in sorted(questions):
        misjudged = {
            name: task.misjudged([record for _, record in own], threshold) for name, own in questions[source].items()
        }
        wrong = [name for name, (_, share, _) in misjudged.items() if share > 0]
        worst = sorted(wrong, key=misjudged.__getitem__, reverse=True)[: each // 2]
        rest = [name for name in questions[source] if name not in worst]
        drawn = sorted(rest, key=lambda name: hashlib.sha256(name.encode()).hexdigest())[: each - len(worst)]
        for name in [*worst, *drawn]:
            cards.append(_card(questions[source][name], name in worst, task, threshold))
    return cards[:MAX_CARDS]


def _card(pairs: list[tuple[dict, dict]], worst: bool, task: Task, threshold: float | None) -> dict[str, Any]:
    item = pairs[0][0]
    solutions = [_solution(own, record, task, threshold) for own, record in pairs]
    solutions = sorted(solutions, key=lambda solution: -solution["mean"])
    return {
        "name": plain(item["id"] if len(pairs) == 1 else item["group"], MAX_TEXT),
        "source": item["source"],
        "policy_model": plain(str(item.get("policy_model") or ""), MAX_TEXT),
        "prompt": plain(item["prompt"], MAX_TEXT),
        "images": [thumbnail(path, THUMBNAIL) for path in item["images"][:MAX_IMAGES]],
        "more_images": max(0, len(item["images"]) - MAX_IMAGES),
        "worst": worst,
        "solutions": solutions[:MAX_SOLUTIONS],
        "more_solutions": max(0, len(solutions) - MAX_SOLUTIONS),
        "verdicts": {solution["verdict"] for solution in solutions[:1]},
    }


def _solution(item: dict[str, Any], record: dict[str, Any], task: Task, threshold: float | None) -> dict[str, Any]:
    labels, scores = record["labels"], record["scores"]
    wrong = [index for index, label in enumerate(labels) if label == -1]
    below = [index for index, score in enumerate(scores) if threshold is not None and score < threshold]
    steps = [
        {
            "text": plain(text, MAX_TEXT),
            "label": label,
            "score": score,
            "colour": colour(score),
            "first_error": bool(wrong) and index == wrong[0],
            "reported": index in below,
            "misjudged": misjudged_step(label, score, threshold),
        }
        for index, (text, label, score) in enumerate(zip(item["completions"], labels, scores, strict=True))
    ]
    return {
        "n_labelled": sum(label != 0 for label in labels),
        "n_misjudged": sum(step["misjudged"] is not None for step in steps),
        "steps": steps[:MAX_STEPS],
        "more_steps": max(0, len(steps) - MAX_STEPS),
        "verdict": task.verdict(record, [index for index in below if labels[index] != 0]),
        "mean": AGGREGATES["mean"](scores),
    }


def _calibration(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Bins of the reliability diagram, and the distribution of scores of correct and of incorrect steps."""
    labels, scores = ([record[key] for record in records] for key in ("labels", "scores"))
    label, score = np.concatenate(labels), np.concatenate(scores)
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    shares = {}
    for name, value in (("correct", 1), ("incorrect", -1)):
        counts = np.histogram(score[label == value], bins=edges)[0]
        shares[name] = (counts / max(1, counts.sum())).tolist()
    bins = calibration_bins(labels, scores)
    return {
        "bins": [bin for bin in bins if bin["n_steps"]],
        "most": max(1, *(bin["n_steps"] for bin in bins)),
        "shares": shares,
        "top": ceil(10 * max(0.1, *shares["correct"], *shares["incorrect"])) / 10,
        "width": 1 / CALIBRATION_BINS,
    }
