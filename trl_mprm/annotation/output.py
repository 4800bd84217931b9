"""
Write annotated rollouts as rows of our own type, or in the schema of VisualPRM400K-v1.1-Raw.

    {"images": ["1471.png"], "prompt": "Find x.", "completions": ["x = 5.", "Final answer: 5"], "labels": [0.125, 0.0],
     "mc_scores": [0.125, 0.0], "mc_counts": [2, 0], "mc_total": 16, "answer": "52", "source": "AI2D",
     "rollout_id": "AI2D:3", "draws": [{"checker": "math", "seed": 1163, "right": [1, 0, ...], "finish": ["stop", ...],
     "tokens": [41, ...], "prompt_tokens": 310, "cached_tokens": 268}, {"checker": "math", "finish": ["checked"], ...}]}

`mc_total` is one number, or one per step if draws were lost; a step without a measured draw has the score null and the
label -100.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, Image, List, Value
from datasets.table import embed_table_storage

from ..data.rollouts import FEATURES
from ..data.rows import IGNORE_INDEX, image_list
from ..files import atomic_output
from .budget import Tally
from .progress import Progress
from .questions import Rollout


DRAWS = {
    "checker": Value("string"),
    "seed": Value("int64"),
    "right": List(Value("int64")),
    "finish": List(Value("string")),
    "tokens": List(Value("int64")),
    "prompt_tokens": Value("int64"),
    "cached_tokens": Value("int64"),
}
COLUMNS = dict(FEATURES) | {"answer": Value("string"), "self_confidence": Value("float64"), "draws": List(DRAWS)}


def evidence(rollout: Rollout, step: int, tally: Tally, progress: Progress, checker: str) -> dict[str, Any]:
    """Describe the draws of a step; for a step that was checked, `finish` is `["checked"]`."""
    if step >= rollout.sampled:
        right = [int(tally.right[step] > 0)]
        return dict.fromkeys(DRAWS) | {"checker": checker, "right": right, "finish": ["checked"], "tokens": []}
    records = sorted(progress.draws.get((rollout.id, rollout.key, step), []), key=lambda record: record["first"])
    lists = {name: [value for r in records for value in r[name]][: tally.n] for name in ("right", "finish", "tokens")}
    known = {
        name: sum(values) if (values := [r[name] for r in records if r[name] is not None]) else None
        for name in ("prompt_tokens", "cached_tokens")
    }
    return {"checker": checker, "seed": records[0]["seed"] if records else None} | lists | known


def annotated_row(rollout: Rollout, tally: Tally, draws: list[dict[str, Any]]) -> dict[str, Any]:
    """
    Make the row of a rollout that has all its draws, with `images` as its record names them.

    Examples:
    ```python
    >>> from trl_mprm.annotation.budget import Tally
    >>> from trl_mprm.annotation.output import annotated_row
    >>> from trl_mprm.annotation.questions import to_rollout
    >>> rollout = to_rollout({"prompt": "1 + 1?", "answer": "2", "completions": ["It is 2.", "So 3."]}, "a:0")
    >>> row = annotated_row(rollout, Tally(4, [3, 0], [4, 2], [4, 4]), [])
    >>> row["mc_scores"], row["mc_counts"], row["mc_total"]
    ([0.75, 0.0], [3, 0], [4, 2])

    ```
    """
    scores, totals = tally.scores(), list(tally.measured)
    return {
        "images": image_list(rollout.record),
        "prompt": rollout.prompt,
        "completions": list(rollout.steps),
        "labels": [float(IGNORE_INDEX) if score is None else score for score in scores],
        "mc_scores": scores,
        "mc_counts": list(tally.right),
        "mc_total": totals[0] if len(set(totals)) == 1 else totals,
        "answer": rollout.answer,
        "source": rollout.source,
        "rollout_id": rollout.id,
        "draws": draws,
    }


def raw_record(rollout: Rollout, tally: Tally) -> dict[str, Any]:
    """
    Make a record of VisualPRM400K-v1.1-Raw; other keys of the input stay, as in the pipeline of that dataset.

    Examples:
    ```python
    >>> from trl_mprm.annotation.budget import Tally
    >>> from trl_mprm.annotation.output import raw_record
    >>> from trl_mprm.annotation.questions import to_rollout
    >>> rollout = to_rollout({"image": "a.png", "prompt": "1 + 1?", "answer": "2", "completions": ["It is 2."]}, "a:0")
    >>> raw_record(rollout, Tally(4, [3], [4], [4]))["steps_with_score"]
    [{'step': 'It is 2.', 'score': 0.75, 'num_mc_correct': 3, 'num_mc_total': 4}]

    ```
    """
    ours = {"images", "prompt", "completions", "labels", "mc_scores", "mc_counts", "mc_total", "rollout_id", "draws"}
    ours |= {"self_confidence", "agreement"}
    images = image_list(rollout.record)
    raw = {
        "image": images[0] if len(images) == 1 else images,
        "question": rollout.record.get("question") or "<image>\n" * len(images) + rollout.prompt,
        "question_orig": rollout.prompt,
        "answer": rollout.answer,
        "response": "\n\n".join(rollout.steps),
        "steps_with_score": [
            {"step": step, "score": score or 0.0, "num_mc_correct": right, "num_mc_total": total}
            for step, score, right, total in zip(
                rollout.steps, tally.scores(), tally.right, tally.measured, strict=True
            )
        ],
        "num_mc_sequences": tally.n,
    }
    return raw | {name: value for name, value in rollout.record.items() if name not in {*ours, *raw}}


def write_jsonl(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Write records as JSON lines, whole or not at all. Raises `ValueError` for a picture in memory."""
    with atomic_output(path) as part, open(part, "w", encoding="utf-8") as file:
        for record in records:
            try:
                file.write(json.dumps(_named_images(record), ensure_ascii=False) + "\n")
            except TypeError as error:
                raise ValueError(
                    f"{path}: a row holds a value that JSON cannot represent ({error}): give --output *.parquet, or images as paths"
                ) from error


def _named_images(record: dict[str, Any]) -> dict[str, Any]:
    def named(image: Any) -> Any:
        if isinstance(image, dict) and image.get("bytes") is None:
            return image.get("path")
        return os.fspath(image) if isinstance(image, os.PathLike) else image

    for name in ("images", "image"):
        if isinstance(record.get(name), list):
            record = record | {name: [named(image) for image in record[name]]}
    return record


def to_dataset(rows: Sequence[dict[str, Any]], images: Sequence[list[Any]]) -> Dataset:
    """
    Make a [`~datasets.Dataset`] of rows, with the images to open. `mc_total` is null if the steps do not all have the
    same total, as [`~trl_mprm.load_rollouts`] reads it; `draws` has the total of each.
    """
    columns = COLUMNS | ({"agreement": List(Value("float64"))} if any("agreement" in row for row in rows) else {})
    rows = [
        row | {"images": found, "mc_total": row["mc_total"] if isinstance(row["mc_total"], int) else None}
        for row, found in zip(rows, images, strict=True)
    ]
    return Dataset.from_list(rows, features=Features(columns))


def write_parquet(rows: Dataset, path: Path) -> None:
    """Write a dataset as Parquet with its pictures inside, whole or not at all."""
    undecoded = rows.cast_column("images", List(Image()))
    with atomic_output(path) as part:
        Dataset(datasets.table.InMemoryTable(embed_table_storage(undecoded.data.table))).to_parquet(part)
