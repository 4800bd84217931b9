"""
Read solutions to score, with or without annotations, from files of rows in any format or from lines of JSON.

    {"prompt": "1 + 1?", "completions": ["1 + 1 = 2."]}                      one solution
    {"prompt": "1 + 1?", "candidates": [["It is 2."], "Add them.\\n\\nSo 2."]}   several, as steps or as texts to split
"""

import os
from collections.abc import Iterable, Iterator
from itertools import chain, groupby
from pathlib import Path
from typing import Any, NamedTuple

from .formats import READ_KEYS, parse, to_solution
from .images import ImageFinder, find_images
from .rows import Reason, Refused
from .shards import line_batches, plan_shards
from .splitting import split_steps


KEYS = {*READ_KEYS, "candidates"}


class Solution(NamedTuple):
    """A solution: its place, its record, and its row (`prompt`, `completions`, `images`) or the refusal."""

    place: str
    record: dict[str, Any]
    row: dict[str, Any] | Refused


def read_solutions(
    path: str | os.PathLike, image_root: str | os.PathLike | None = None, split: str = "blank_line"
) -> Iterator[Solution]:
    """
    Read solutions one by one.

    Args:
        path (`str`):
            A file or folder, as in [`load_rollouts`].
        image_root (`str`, *optional*):
            Folder of the images. Defaults to the folder of the file.
        split (`str`, *optional*, defaults to `"blank_line"`):
            How to split a candidate that is one text into steps, see [`split_steps`].

    Examples:
    ```python
    >>> import pathlib, tempfile
    >>> from trl_mprm.data.solutions import read_solutions
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "a.jsonl"
    >>> _ = file.write_text('{"prompt": "1 + 1?", "candidates": [["It is 2."], "Add.\\\\n\\\\nSo 2."]}\\n')
    >>> [solution.row["completions"] for solution in read_solutions(file)]
    [['It is 2.'], ['Add.', 'So 2.']]

    ```
    """
    for _, shards in groupby(plan_shards(path), key=lambda shard: shard.place):
        first, *others = shards
        batches = (batch for shard in (first, *others) for _, batch in line_batches(shard, KEYS))
        root = Path(first.file).parent if image_root is None else image_root
        yield from solutions_of(chain.from_iterable(batches), first.place, root, split)


def solutions_of(
    lines: Iterable[bytes], name: str, image_root: str | os.PathLike | None, split: str = "blank_line"
) -> Iterator[Solution]:
    """Read solutions from lines of JSON; `name` stands for the file in places, e.g. `"standard input"`."""
    finder = ImageFinder(image_root)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        record = parse(line)
        if record is None or "candidates" not in record:
            yield _solution(f"{name}:{number}", record, finder)
            continue
        candidates = record.pop("candidates")
        if not isinstance(candidates, list) or not candidates:
            yield Solution(
                f"{name}:{number}", record, Refused(Reason.EMPTY_STEPS, "`candidates` is not a list of candidates")
            )
            continue
        for index, steps in enumerate(candidates, 1):
            steps = split_steps(steps, split) if isinstance(steps, str) else steps
            yield _solution(f"{name}:{number}, candidate {index}", record | {"completions": steps}, finder)


def _solution(place: str, record: dict[str, Any] | None, finder: ImageFinder) -> Solution:
    try:
        return Solution(place, record, to_solution(record) | {"images": find_images(record, finder)})
    except Refused as refused:
        return Solution(place, record or {}, refused)
