"""
Score a benchmark with a model, keep every score, and measure.

An item of [`read_benchmark`]

    {"id": "DynaMath:0", "images": ["/data/images/12.png"], "prompt": "How many tiles are red?",
     "completions": ["A and C are red.", "So 3."], "labels": [1, -1], "source": "DynaMath", "group": "5f0c...",
     "policy_model": "GPT-4o"}

becomes a line of `scores.jsonl`, from which every measure can be recomputed without a model:

    {"id": "DynaMath:0", "source": "DynaMath", "group": "5f0c...", "policy_model": "GPT-4o", "labels": [1, -1],
     "scores": [0.97, 0.08]}

An item that cannot be scored has `"scores": null` and its `error`.
"""

import json
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..files import atomic_output, write_json
from ..scoring import ProcessRewardModel
from .benchmarks import Benchmark, read_benchmark
from .fingerprint import fingerprint


KEPT_COLUMNS = ("id", "source", "group", "policy_model", "labels", "correct")

CHUNK_BATCHES = 4


def evaluate_model(
    model: "ProcessRewardModel",
    benchmark: Benchmark | str | os.PathLike,
    threshold: float | str = "held_out",
    batch_size: int = 8,
    output_dir: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """
    Score every item of a benchmark and measure the scores.

    An interrupted run continues where it stopped if it is started again with the same model, items and batch size, and
    gives byte-identical files. Under `accelerate launch` the processes share the items, and all must call this.

    Args:
        model ([`ProcessRewardModel`]):
            A model, or any object with its method `score_batch(rows, batch_size=...)`.
        benchmark ([`Benchmark`], `str` or `os.PathLike`):
            From [`read_benchmark`], or a path for it.
        threshold (`float` or `str`, *optional*, defaults to `"held_out"`):
            See [`~metrics.step_metrics`]; best-of-N has none.
        batch_size (`int`, *optional*, defaults to `8`):
            Rows scored at once.
        output_dir (`str` or `os.PathLike`, *optional*):
            Folder for `scores.jsonl` (one line per item: id, source, group, policy model, labels, scores) and
            `results.json` (the returned value).

    Returns:
        `dict`: the metrics of [`~metrics.step_metrics`], or of [`~metrics.best_of_n_metrics`] for best-of-N, and under
        `"benchmark"` the counts of records read, refused and odd, and the items that `failed`, each with its error. The
        own scores of a benchmark are under its name (`"prmbench"`).

    Raises:
        `ValueError`: no item could be scored, or see [`read_benchmark`] and [`~metrics.step_metrics`].
    """
    from accelerate import PartialState

    from ..scoring import ProcessRewardModel

    benchmark = benchmark if isinstance(benchmark, Benchmark) else read_benchmark(benchmark)
    items, task = benchmark.items, benchmark.entry.task
    benchmark.check_measurable(threshold)
    if isinstance(model, ProcessRewardModel) and not model.reads_images and all(item["images"] for item in items):
        raise ValueError(
            f"all {len(items)} items have images, and this model, or its step_format, reads none: "
            "use a vision-language model, or a benchmark of text (processbench, prmbench)"
        )
    folder = None if output_dir is None else Path(output_dir)
    records = score_items(model, items, batch_size, folder)
    failed = [{"id": record["id"], "error": record["error"]} for record in records if record["scores"] is None]
    state = PartialState()
    if state.is_main_process:
        if failed:
            first = "{id}: {error}".format(**failed[0])
            if len(failed) == len(items):
                raise ValueError(f"none of {len(items)} items could be scored; first, {first}")
            warnings.warn(f"{len(failed)} of {len(items)} items could not be scored; first, {first}", stacklevel=2)
        read = {**benchmark.report, "title": benchmark.titled(len(failed)), "failed": failed}
        results = {**task.measure(records, threshold), "benchmark": read}
        if benchmark.entry.own_scores is not None:
            results[benchmark.name] = benchmark.entry.own_scores(results)
        if folder is not None:
            with atomic_output(folder / "scores.jsonl") as part:
                part.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
            write_json(results, folder / "results.json")
            for part in folder.glob(".scores.jsonl.*.part"):
                part.unlink()
    state.wait_for_everyone()
    return results if state.is_main_process else json.loads((folder / "results.json").read_text(encoding="utf-8"))


def score_items(
    model: "ProcessRewardModel", items: Sequence[dict[str, Any]], batch_size: int = 8, folder: Path | None = None
) -> list[dict[str, Any]]:
    """
    Score items chunk by chunk. With a `folder`, scores outlive the process, and several processes share the work.

    A chunk holds whole questions and at least four batches. Its records are appended to
    `.scores.jsonl.{fingerprint}.{process}.part` in one write, and a chunk with a missing record is scored again. Chunks,
    batches and hence scores do not depend on interruptions or on the number of processes. The [`fingerprint`] covers
    everything that determines a score. Several machines need a common folder.

    Returns:
        `list[dict]`: a record for each item, in order: id, source, group, policy model, labels, scores. For an item that
        cannot be scored, `scores` is `None` and there is an `error`.
    """
    from accelerate import PartialState

    state = PartialState()
    if folder is None and state.num_processes > 1:
        raise ValueError(f"{state.num_processes} processes need a folder to bring their scores together: set --output")
    done: dict[str, dict] = {}
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        parts = f".scores.jsonl.{fingerprint(model, items, batch_size)}"
        done = _read_parts(folder, parts)
        own = folder / f"{parts}.{state.process_index}.part"
        if own.is_file():  # a truncated write has no newline at its end
            with open(own, "rb+") as file:
                file.truncate(file.read().rfind(b"\n") + 1)
        state.wait_for_everyone()  # no process writes before all have read
    scored = {name for name, record in done.items() if record["scores"] is not None}  # failed items are tried again
    chunks = [chunk for chunk in _chunks(items, batch_size) if not scored.issuperset(item["id"] for item in chunk)]
    mine = chunks[state.process_index :: state.num_processes]
    with tqdm(total=sum(map(len, mine)), desc="scoring", unit="item", delay=2, disable=state.process_index > 0) as bar:
        for chunk in mine:
            outcomes = _score_chunk(model, chunk, batch_size)
            records = [_record(item, outcome) for item, outcome in zip(chunk, outcomes, strict=True)]
            done |= {record["id"]: record for record in records}
            if folder is not None:
                with open(own, "ab") as file:
                    file.write("".join(json.dumps(record) + "\n" for record in records).encode())
            bar.update(len(chunk))
    if state.num_processes > 1:
        state.wait_for_everyone()
        done = _read_parts(folder, parts)
        state.wait_for_everyone()  # no process tidies up before all have read
    return [done[item["id"]] for item in items]


def _chunks(items: Sequence[dict[str, Any]], batch_size: int) -> Iterator[list[dict[str, Any]]]:
    """Split items into chunks that keep a question together, because its prefix is computed once."""
    questions: dict[str, list[dict]] = {}
    for item in items:
        questions.setdefault(item["group"], []).append(item)
    chunk: list[dict] = []
    for question in questions.values():
        chunk += question
        if len(chunk) >= CHUNK_BATCHES * batch_size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _score_chunk(model: "ProcessRewardModel", chunk: list[dict], batch_size: int) -> list[list[float] | str]:
    """Scores or error of each item; a chunk that cannot be scored is halved until the bad item is alone."""
    rows = [
        {**{key: item[key] for key in ("images", "prompt", "completions")}, "rollout_id": item["id"]} for item in chunk
    ]
    try:
        scores = model.score_batch(rows, batch_size=batch_size)
    except Exception as error:  # whatever one item causes, even running out of memory, the others are scored
        if len(chunk) == 1:
            text = " ".join(str(error).split())
            plain = text and isinstance(error, ValueError | OSError)
            return [text if plain else f"{type(error).__name__}: {text}".rstrip(": ")]
        half = len(chunk) // 2
        return [outcome for part in (chunk[:half], chunk[half:]) for outcome in _score_chunk(model, part, batch_size)]
    if len(scores) != len(rows):
        raise ValueError(f"the model scored {len(scores)} rows, expected {len(rows)}: one list of scores per row")
    return [_checked([float(score) for score in own], item) for own, item in zip(scores, chunk, strict=True)]


def _checked(scores: list[float], item: dict[str, Any]) -> list[float] | str:
    if len(scores) == len(item["labels"]) and all(0 <= score <= 1 for score in scores):
        return scores
    return f"expected {len(item['labels'])} scores in [0, 1], one per step, got {scores}"


def _record(item: dict[str, Any], outcome: list[float] | str) -> dict[str, Any]:
    kept = {key: item[key] for key in KEPT_COLUMNS if key in item}
    return {**kept, "scores": None, "error": outcome} if isinstance(outcome, str) else {**kept, "scores": outcome}


def _read_parts(folder: Path, parts: str) -> dict[str, dict]:
    records = {}
    for file in folder.glob(f"{parts}.*.part"):
        for number, line in enumerate(file.read_bytes().splitlines(keepends=True), start=1):
            if not line.endswith(b"\n"):  # a truncated write
                continue
            try:
                record = json.loads(line)
                name, scores = record["id"], record["scores"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{file}, line {number}: expected the scores of an item, as an interrupted evaluation left them, got "
                    f"{line[:60]!r}: delete the file, and its items are scored again"
                ) from error
            if scores is not None or name not in records:
                records[name] = record
    return records
