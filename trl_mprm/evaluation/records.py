"""Read the lines of `scores.jsonl`, measure them with any threshold, and compare them with those of another model."""

import json
import os
from pathlib import Path
from typing import Any

from .benchmarks import Benchmark
from .metrics import paired_bootstrap
from .tasks import task_of


def recompute_metrics(scores_file: str | os.PathLike, threshold: float | str = "held_out") -> dict[str, Any]:
    """Measure a `scores.jsonl` of [`evaluate_model`] with any threshold, without a model."""
    records = read_scores(scores_file)
    return task_of(records).measure(records, threshold)


def read_scores(scores_file: str | os.PathLike) -> list[dict[str, Any]]:
    """Read the records of a `scores.jsonl`. Raises `ValueError` with the first line that is not a record."""
    if not Path(scores_file).is_file():
        raise FileNotFoundError(f"{scores_file}: no such file; expected a scores.jsonl written by `evaluate`")
    records = []
    for number, line in enumerate(Path(scores_file).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            for key in ("labels", "scores", "source", "group"):
                record[key]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{scores_file}, line {number}: expected a JSON object with labels, scores, source, group ({error!r})"
            ) from error
        records.append(record)
    return records


def compare_models(
    scores_file: str | os.PathLike, other_file: str | os.PathLike, threshold: float | str = "held_out"
) -> dict[str, dict]:
    """
    Test whether two models differ on the items that both scored: [`~metrics.paired_bootstrap`] of two `scores.jsonl`.

    Raises `ValueError` if the labels of an item differ between the files, or if the files have no item in common.
    """
    records = {record["id"]: record for record in read_scores(scores_file) if record["scores"] is not None}
    pairs = []
    for other in read_scores(other_file):
        record = records.get(other["id"])
        if record is not None and other["scores"] is not None:
            if record["labels"] != other["labels"]:
                raise ValueError(
                    f"item {other['id']} has other labels in {other_file} than in {scores_file}: "
                    "expected two models on one benchmark"
                )
            pairs.append((record["labels"], record["scores"], other["scores"], record["source"], record["group"]))
    if not pairs:
        raise ValueError(f"no item of {other_file} is in {scores_file}: expected two models on one benchmark")
    return paired_bootstrap(*zip(*pairs, strict=True), threshold=threshold)


def check_comparable(benchmark: Benchmark, other_file: str | os.PathLike) -> None:
    """Raise, before anything is scored, if the scores of another model cannot be compared on a benchmark."""
    if not benchmark.entry.task.labelled:
        raise ValueError("two models are compared by their step labels, and best-of-N has none")
    labels = {item["id"]: item["labels"] for item in benchmark.items}
    others = [record for record in read_scores(other_file) if record.get("id") in labels]
    if not others:
        raise ValueError(f"no item of {other_file} is in {benchmark.path}: expected two models on one benchmark")
    odd = next((record["id"] for record in others if record["labels"] != labels[record["id"]]), None)
    if odd is not None:
        raise ValueError(
            f"item {odd} has other labels in {other_file} than in {benchmark.path}: expected two models on one benchmark"
        )
