"""
Turn questions with an answer, with or without solutions, into rollouts to annotate.

A record has one of these forms (the first has no solution yet):

    {"images": ["1471.png"], "prompt": "Find x.", "answer": "52"}
    {"images": ["1471.png"], "prompt": "Find x.", "answer": "52", "completions": ["x = 5.", "Final answer: 5"]}
    {"image": "1471.png", "question": "<image>\\nFind x.", "answer": "52", "steps_with_score": [{"step": "x = 5."}]}

It becomes a [`Rollout`]. If its last step states the final answer, that step is checked and not sampled.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ..data.formats import READ_KEYS, parse, prompt_text, states_answer
from ..data.images import ImageFinder, find_images
from ..data.rows import Refused, check_steps, image_list, own_text, question_key
from ..data.shards import Paths, line_batches, plan_shards
from ..data.splits import local_inputs
from ..data.splitting import split_steps


@dataclass(frozen=True)
class Rollout:
    """
    One solution of a question or, without steps, a question that waits for solutions.

    Attributes:
        id (`str`), source (`str`): `rollout_id` and `source` of the row.
        key (`str`): Hash of everything that the draws depend on, so that draws for another text are never reused.
        record (`dict`): The record that the rollout comes from.
        images (`list`): What [`~trl_mprm.data.images.open_image`] takes.
    """

    id: str
    source: str
    key: str
    record: dict[str, Any]
    images: list[Any]
    prompt: str
    answer: str
    steps: tuple[str, ...] = ()

    def with_solution(self, number: int, text: str, max_steps: int) -> "Rollout":
        """Make a rollout of the `number`-th sampled solution of this question, split at blank lines."""
        steps = merge_steps(split_steps(text), max_steps)
        return rollout(f"{self.id}:{number}", self.source, self.record, self.images, self.prompt, self.answer, steps)

    @property
    def sampled(self) -> int:
        """The number of steps that are sampled: all, except a last one that states the final answer."""
        return len(self.steps) - states_answer(self.steps[-1])


def rollout(
    id: str, source: str, record: dict, images: list, prompt: str, answer: str, steps: Sequence[str]
) -> Rollout:
    key = xxhash.xxh3_64_hexdigest("\0".join([*question_key(prompt, images), answer, *steps]).encode())
    return Rollout(id, source, key, record, images, prompt, answer, tuple(steps))


def merge_steps(steps: Sequence[str], max_steps: int) -> list[str]:
    """
    Join neighbouring steps evenly into at most `max_steps` steps, as the data of VisualPRM were made.

    Examples:
    ```python
    >>> from trl_mprm.annotation.questions import merge_steps
    >>> merge_steps(["a", "b", "c", "d", "e"], 2)
    ['a\\n\\nb\\n\\nc', 'd\\n\\ne']

    ```
    """
    groups = np.array_split(np.arange(len(steps)), min(len(steps), max_steps)) if steps else []
    return ["\n\n".join(steps[place] for place in group) for group in groups]


def to_rollout(
    record: Mapping[str, Any], name: str, source: str = "rows", finder: ImageFinder | None = None
) -> Rollout:
    """
    Make the rollout of a record. Raises `ValueError`, which names `name`, if question, answer or an image is missing.

    Args:
        record (`Mapping`):
            A record in one of the forms above, with or without `source` and `rollout_id`.
        name (`str`):
            Its place in messages, and its `rollout_id` if it has none.
        finder ([`ImageFinder`], *optional*):
            Finds images by name; without one the images are taken from the record unchanged.
    """
    record = dict(record)
    try:
        prompt = prompt_text(record)
        images = image_list(record) if finder is None else find_images(record, finder)
        steps = record.get("completions")
        if steps is None and record.get("steps_with_score"):
            steps = [step.get("step") for step in record["steps_with_score"]]
        if steps is not None:
            check_steps(steps)
    except Refused as refused:
        raise ValueError(f"{name}: {refused}: correct or remove the row") from refused
    answer = record.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(
            f"{name}: `answer` is {answer!r:.60}, expected the right answer as text, by which draws are checked"
        )
    id = own_text(record, "rollout_id") or name
    return rollout(id, own_text(record, "source") or source, record, images, prompt, answer, steps or ())


def from_rows(rows: Iterable[Mapping[str, Any]]) -> list[Rollout]:
    """Make rollouts of rows in memory; a `rollout_id` that occurs twice is an error."""
    return _distinct(to_rollout(row, f"row {number}") for number, row in enumerate(rows))


def from_files(inputs: Paths, image_root: str | os.PathLike | None = None) -> list[Rollout]:
    """Make rollouts of files: folders, globs, `*.jsonl`, `*.parquet`, or a Hub id with an `annotations.zip`."""
    return _distinct(_read(inputs, image_root))


def _read(inputs: Paths, image_root: str | os.PathLike | None) -> Iterator[Rollout]:
    finders: dict[Path, ImageFinder] = {}
    place, number = "", 0
    for shard in plan_shards(local_inputs(inputs)):
        root = Path(shard.file).parent if image_root is None else Path(image_root)
        finder = finders.setdefault(root, ImageFinder(root))
        if shard.place != place:
            place, number = shard.place, 0
        for _, lines in line_batches(shard, READ_KEYS | {"answer", "response"}):
            for line in lines:
                number += 1
                if not line.strip():
                    continue
                record = parse(line)
                if record is None:
                    raise ValueError(f"{place}:{number}: expected a JSON object: correct or remove the line")
                record.setdefault("rollout_id", f"{shard.source}:{number - 1}")
                yield to_rollout(record, f"{place}:{number}", shard.source, finder)


def _distinct(rollouts: Iterable[Rollout]) -> list[Rollout]:
    seen: dict[str, Rollout] = {}
    for item in rollouts:
        if item.id in seen:
            raise ValueError(
                f"rollout_id {item.id!r} occurs twice: give each row its own, because draws are stored under it"
            )
        seen[item.id] = item
    if not seen:
        raise ValueError("no rows to annotate: expected at least one row with prompt and answer")
    return list(seen.values())
