"""
Score a benchmark of labelled steps with a model, keep every score, and measure.

A line of the benchmark, in VisualProcessBench's format (labels 1 correct, 0 neutral, -1 incorrect):

    {"image": ["images/12.png"], "question": "How many tiles are red?", "data_source": "DynaMath",
     "response": {"steps": ["A and C are red.", "So 3."], "process_correctness": [1, -1]}, "policy_model": "GPT-4o"}

becomes an item that [`ProcessRewardModel.score_batch`] reads:

    {"id": "DynaMath:0", "images": ["/data/images/12.png"], "prompt": "How many tiles are red?",
     "completions": ["A and C are red.", "So 3."], "labels": [1, -1], "source": "DynaMath", "group": "5f0c...",
     "policy_model": "GPT-4o"}
"""

import hashlib
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from .files import atomic_output, write_json
from .images import ImageFinder, ImageRefused
from .metrics import step_metrics


if TYPE_CHECKING:  # scores can be measured again without torch
    from .scoring import ProcessRewardModel

KEPT_COLUMNS = ("id", "source", "group", "policy_model", "labels")
OVERALL_ROWS = {
    "macro_f1_step_weighted": "overall, step-weighted (the paper)",
    "macro_f1_pooled": "overall, pooled (VisualPRM)",
    "macro_f1_source_mean": "overall, mean of sources",
}
# <image>, <image1>, <image 1>: images come before the question here, and "<image>" is an image token of some models.
IMAGE_TAG = re.compile(r"<image ?\d*>\s*")


@dataclass(frozen=True)
class Benchmark:
    """Items to score, and the lines that cannot be: `{"line", "reason", "detail"}` each, `line` counting from 1."""

    path: str
    items: list[dict[str, Any]]
    refused: list[dict[str, Any]]

    @property
    def report(self) -> dict[str, Any]:
        """What was read and refused, for `results.json`."""
        reasons = dict(sorted(Counter(refusal["reason"] for refusal in self.refused).items()))
        read = len(self.items) + len(self.refused)
        return {"path": self.path, "read": read, "refused": reasons, "refused_lines": self.refused}


class _Refused(Exception):
    """A line that cannot be used: reason, detail."""


def read_benchmark(path: str | os.PathLike, image_root: str | os.PathLike | None = None) -> Benchmark:
    """
    Read a benchmark in VisualProcessBench's format, checking every line and every image.

    Args:
        path (`str` or `os.PathLike`):
            A JSONL file, or a folder with `test.jsonl`.
        image_root (`str` or `os.PathLike`, *optional*):
            Folder that image paths are relative to and must stay in. Default: the folder of the file.

    Returns:
        [`Benchmark`]. Refused lines have one of these reasons: `not_json`, `bad_field` (a key is missing or of another
        type), `text_not_unicode`, `empty_steps`, `step_without_text`, `labels_not_one_a_step`, `bad_label`, or
        one of `image_not_a_path`, `image_missing`, `image_outside_root`, `image_unreadable`.
        `group` is the same for solutions of one question: a hash of the question and the bytes of its images.

    Raises:
        `FileNotFoundError`: no such file. `ValueError`: no usable line.
    """
    file = Path(path)
    file = file / "test.jsonl" if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: no such file; expected a JSONL file or a folder with test.jsonl "
            "(download a Hub dataset first: hf download --repo-type dataset --local-dir FOLDER ID)"
        )
    finder = ImageFinder(image_root if image_root is not None else file.parent)
    items, refused = [], []
    lines = file.read_bytes().splitlines()
    for index, line in enumerate(tqdm(lines, desc=f"reading {file.name}", unit="item", delay=2)):
        if not line.strip():
            continue
        try:
            items.append(_item(line, index, finder))
        except _Refused as refusal:
            reason, detail = refusal.args
            refused.append({"line": index + 1, "reason": reason, "detail": detail})
    if not items:
        first = "it is empty" if not refused else "line {line}: {reason}, {detail}".format(**refused[0])
        raise ValueError(f"{file} has no usable line ({first}); expected VisualProcessBench's format")
    benchmark = Benchmark(str(file), items, refused)
    if refused:
        counts = ", ".join(f"{count} {reason}" for reason, count in benchmark.report["refused"].items())
        first = "line {line}: {detail}".format(**refused[0])
        warnings.warn(f"{file}: {len(refused)} lines refused ({counts}); first, {first}", stacklevel=2)
    return benchmark


def evaluate_model(
    model: "ProcessRewardModel",
    benchmark: Benchmark | str | os.PathLike,
    threshold: float | str = "held_out",
    batch_size: int = 8,
    output_dir: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """
    Score every item of a benchmark and measure the scores.

    Args:
        model ([`ProcessRewardModel`]):
            Or any object with its `score_batch(rows, batch_size=...)`.
        benchmark ([`Benchmark`], `str` or `os.PathLike`):
            From [`read_benchmark`], or a path for it.
        threshold (`float` or `str`, *optional*, defaults to `"held_out"`):
            See [`~metrics.step_metrics`].
        batch_size (`int`, *optional*, defaults to `8`):
            Rows scored at once.
        output_dir (`str` or `os.PathLike`, *optional*):
            Folder for `scores.jsonl` (one line per item: id, source, group, policy model, labels, scores) and
            `results.json` (what is returned).

    Returns:
        `dict`: the metrics of [`~metrics.step_metrics`], and under `"benchmark"` what was read and refused.

    Raises:
        `ValueError`: the model returned another number of scores than there are steps, or see [`read_benchmark`] and
        [`~metrics.step_metrics`].
    """
    benchmark = benchmark if isinstance(benchmark, Benchmark) else read_benchmark(benchmark)
    items = benchmark.items
    # A dry run with scores of 0.5: what cannot be measured fails here, not after hours of scoring.
    _measure([{**item, "scores": [0.5] * len(item["labels"])} for item in items], threshold, n_resamples=0)
    scores = model.score_batch(items, batch_size=batch_size)
    if len(scores) != len(items):
        raise ValueError(f"the model scored {len(scores)} rows, expected {len(items)}: one list of scores per row")
    records = []
    for item, row_scores in zip(items, scores, strict=True):
        row_scores = [float(score) for score in row_scores]
        if len(row_scores) != len(item["labels"]) or not all(0 <= score <= 1 for score in row_scores):
            raise ValueError(
                f"item {item['id']}: expected {len(item['labels'])} scores in [0, 1], one per step, got {row_scores}"
            )
        records.append({**{key: item[key] for key in KEPT_COLUMNS}, "scores": row_scores})
    if output_dir is not None:
        with atomic_output(Path(output_dir) / "scores.jsonl") as part:
            part.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    results = {**_measure(records, threshold), "benchmark": benchmark.report}
    if output_dir is not None:
        write_json(results, Path(output_dir) / "results.json")
    return results


def recompute_metrics(scores_file: str | os.PathLike, threshold: float | str = "held_out") -> dict[str, Any]:
    """Measure a `scores.jsonl` of [`evaluate_model`] again, without a model, with any threshold."""
    if not Path(scores_file).is_file():
        raise FileNotFoundError(f"{scores_file}: no such file; expected a scores.jsonl written by `evaluate`")
    records = []
    for number, line in enumerate(Path(scores_file).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            records.append({key: json.loads(line)[key] for key in ("labels", "scores", "source", "group")})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{scores_file}, line {number}: expected a JSON object with labels, scores, source, group ({error!r})"
            ) from error
    return _measure(records, threshold)


def table_rows(metrics: dict[str, Any]) -> list[list[str]]:
    """
    Lay metrics out as a table of strings, in percent: header, a row per source, a row per overall convention.

    Examples:
    ```python
    >>> from trl_mprm.evaluation import table_rows
    >>> from trl_mprm.metrics import step_metrics
    >>> metrics = step_metrics([[1, -1], [1, 1, -1]], [[0.9, 0.2], [0.8, 0.4, 0.3]], threshold=0.5)
    >>> for row in table_rows(metrics):
    ...     print(" | ".join(row))
    source | steps | F1 correct | F1 incorrect | macro-F1 (fixed threshold) | 95% interval | AUC
    all | 5 | 80.00 | 80.00 | 80.00 | - | 100.00
    overall, step-weighted (the paper) | 5 | - | - | 80.00 | 66.67 to 100.00 | 100.00
    overall, pooled (VisualPRM) | 5 | - | - | 80.00 | 66.67 to 100.00 | 100.00
    overall, mean of sources | 5 | - | - | 80.00 | 66.67 to 100.00 | 100.00

    ```
    """
    header = ["source", "steps", "F1 correct", "F1 incorrect"]
    rows = [[*header, f"macro-F1 ({metrics['threshold_protocol']} threshold)", "95% interval", "AUC"]]
    for name, source in metrics["sources"].items():
        f1 = [_percent(source[key]) for key in ("f1_correct", "f1_incorrect", "macro_f1")]
        rows.append([name, str(source["n_steps"]), *f1, "-", _percent(source["auc"])])
    for key, name in OVERALL_ROWS.items():
        low_high = metrics["intervals"].get(key)
        interval = " to ".join(map(_percent, low_high)) if low_high else "-"
        steps, auc = str(metrics["n_steps"]), _percent(metrics["auc"])
        rows.append([name, steps, "-", "-", _percent(metrics[key]), interval, auc])
    return rows


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _measure(records: Sequence[dict[str, Any]], threshold: float | str, **kwargs: Any) -> dict[str, Any]:
    columns = ([record[key] for record in records] for key in ("labels", "scores", "source", "group"))
    return step_metrics(*columns, threshold=threshold, **kwargs)


@cache
def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _item(line: bytes, index: int, finder: ImageFinder) -> dict[str, Any]:
    """Turn a line into an item, or raise `_Refused`."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _Refused("not_json", str(error)) from error
    if not isinstance(record, dict):
        raise _Refused("not_json", f"expected an object, got {type(record).__name__}")
    response = _field(record, "response", dict)
    steps, labels = _field(response, "steps", list), _field(response, "process_correctness", list)
    question, source = _field(record, "question", str), _field(record, "data_source", str)
    images = _field(record, "image", str | list)
    if not steps:
        raise _Refused("empty_steps", "response.steps is empty")
    for number, step in enumerate(steps):
        if not isinstance(step, str) or not step.strip():
            raise _Refused("step_without_text", f"step {number} is {step!r:.80}, expected text")
        _check_unicode(f"step {number}", step)
    if len(steps) != len(labels):
        raise _Refused("labels_not_one_a_step", f"{len(steps)} steps, {len(labels)} labels")
    for number, label in enumerate(labels):
        if isinstance(label, bool) or label not in (1, 0, -1):
            raise _Refused("bad_label", f"label {number} is {label!r:.80}, expected 1, 0 or -1")
    try:
        paths = [finder.find(image) for image in ([images] if isinstance(images, str) else images)]
    except ImageRefused as refused:
        raise _Refused(refused.reason, str(refused)) from refused
    question = IMAGE_TAG.sub("", question).strip()
    identity = json.dumps([question, [_digest(path) for path in paths]])
    return {
        "id": f"{source}:{index}",
        "images": paths,
        "prompt": question,
        "completions": steps,
        "labels": [int(label) for label in labels],
        "source": source,
        "group": hashlib.sha256(identity.encode()).hexdigest()[:16],
        "policy_model": record.get("policy_model"),
    }


def _field(record: dict[str, Any], key: str, kind: Any) -> Any:
    if not isinstance(record.get(key), kind):
        got = f"{record[key]!r:.80}" if key in record else "no such key"
        raise _Refused("bad_field", f"{key}: expected {getattr(kind, '__name__', kind)}, got {got}")
    if kind is str:
        _check_unicode(key, record[key])
    return record[key]


def _check_unicode(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _Refused("text_not_unicode", f"{name} holds a lone surrogate, which no tokenizer reads") from error
