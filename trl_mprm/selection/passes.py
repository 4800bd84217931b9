"""
The two passes over a shard: `score_shard` reads what scores need, `emit` copies the rows that are kept.

A line of `Geometry3K.jsonl`:

    {"image": "1471.png", "question": "Find x.", "steps_with_score": [{"step": "x = 5.", "score": 0.125, ...}], ...}

The first pass keeps a few bytes of it: its kind (1 step, 1 positive, sum 0.125), its length, a hash of question and
image. The second copies the line byte for byte if it is kept.

The first pass has two ways to read a line. The narrow one parses the few fields of raw annotations that decide about a
row, typed, and takes a line only if nothing about it is unusual. All other lines go the careful way of
`data.formats.to_row`, which alone decides why a row is refused.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from ..data.evidence import kept_sources
from ..data.images import ImageFinder
from ..data.shards import Shard, line_batches, lines_at
from .columns import read_values
from .lines import LineReader, checksum, is_utf8
from .rules import CutSpec
from .summary import (
    REASONS,
    Scores,
    Summary,
    reason_of_kinds,
    summarize,
    with_values,
)
from .threshold import Cut, kept_rows


# Lines that are remembered as Python numbers before they become arrays: enough that the calls of numpy cost nothing a
# line, few enough that the lists stay in the processor's cache.
LINES_AS_NUMBERS = 4096


def score_shard(
    shard: Shard,
    image_root: str | os.PathLike | None = None,
    *,
    drop_answer_step: bool = False,
    words: bool = False,
    spec: CutSpec | None = None,
) -> tuple[Scores, Summary]:
    """
    First pass: compute the few bytes kept per line of a shard, and the summary to send.

    Args:
        shard ([`~trl_mprm.data.shards.Shard`]):
            A shard from [`~trl_mprm.data.shards.plan_shards`].
        image_root (`str` or path, *optional*):
            Folder of the images. Defaults to the folder of the file.
        drop_answer_step (`bool`, *optional*, defaults to `False`):
            Treat a last step that states the final answer as not measured.
        words (`bool`, *optional*, defaults to `False`):
            Count the words of the measured steps.
        spec ([`~trl_mprm.selection.rules.CutSpec`], *optional*):
            The request of the selection, whose rule may read further fields.

    Examples:
    ```python
    >>> import pathlib, tempfile
    >>> from trl_mprm.selection.passes import score_shard
    >>> from trl_mprm.data.shards import plan_shards
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "toy.jsonl"
    >>> _ = file.write_text('{"question": "?", "steps_with_score": [{"step": "a", "score": 0.5}]}\\n{}\\n')
    >>> scores, summary = score_shard(plan_shards(file)[0])
    >>> scores.kind.tolist(), summary.kinds["mc_sum"].tolist(), scores.length.tolist()
    ([0, 1], [0.5, 0.0], [69, 3])

    ```
    """
    with _frames_to_spare():
        scores = _scores(shard, image_root, drop_answer_step, words)
    if spec is not None and spec.entry.reads is not None:
        scores = with_values(scores, read_values(shard, spec))
    return scores, summarize(scores)


def _scores(shard: Shard, image_root: str | os.PathLike | None, drop_answer_step: bool, words: bool) -> Scores:
    file = Path(shard.file)
    finder = _finder(file.parent if image_root is None else image_root, shard.plan)
    sources = kept_sources(shard.file) if shard.dataset is None else []
    rows = LineReader(shard.source, sources, finder, drop_answer_step, words)
    try:
        for block, lines in line_batches(shard):
            rows.add(lines, is_utf8(block))
            if len(rows.columns.state) > LINES_AS_NUMBERS:
                rows.to_arrays()
    except MemoryError as error:
        raise ValueError(
            f"{shard.place}: expected lines that fit into memory, and after {rows.n_lines:,} of them it is full: is this "
            "file of another kind, or an archive made to be huge?"
        ) from error
    return rows.scores(shard)


@contextmanager
def _frames_to_spare(n_frames: int = 200) -> Iterator[None]:
    """
    Parse as if the stack were deeper than it is. The permitted nesting of values depends on the depth of the stack, and a
    line that passes here must be readable wherever it is kept.
    """
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit - n_frames)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


@lru_cache(maxsize=1)
def _finder(root: str | os.PathLike, plan: str) -> ImageFinder:
    """One finder for all shards of a plan that a process reads, so that each picture is checked only once."""
    return ImageFinder(root)


class KeptRows(NamedTuple):
    """
    The kept rows of a shard: their summary, their sources in order, as (source, number of rows), and their line numbers
    in the file, from 0.
    """

    summary: Summary
    runs: list[tuple[str, int]]
    lines: np.ndarray


def emit(shard: Shard, scores: Scores, cut: Cut, kept: BinaryIO, refused: BinaryIO) -> KeptRows:
    """
    Second pass: write the kept lines of a shard to `kept`, byte by byte, each with a line end, and a JSON line (file,
    line, reason) for each refused row to `refused`.

    The checksum of each kept line is compared with that of the first pass, so that the lines written are those scored.

    Examples:
    ```python
    >>> import io, pathlib, tempfile
    >>> from trl_mprm.selection.rules import CutSpec
    >>> from trl_mprm.selection.threshold import find_cut
    >>> from trl_mprm.selection.passes import emit, score_shard
    >>> from trl_mprm.data.shards import plan_shards
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "toy.jsonl"
    >>> _ = file.write_text('{"prompt": "?", "completions": ["a"], "labels": [0.5]}\\n{"prompt": "?"}\\n')
    >>> shard = plan_shards(file)[0]
    >>> scores, summary = score_shard(shard)
    >>> kept, refused = io.BytesIO(), io.BytesIO()
    >>> emit(shard, scores, find_cut(summary, CutSpec("bis", fraction=1.0)), kept, refused).runs
    [('toy', 1)]
    >>> kept.getvalue().decode().strip()
    '{"prompt": "?", "completions": ["a"], "labels": [0.5]}'

    ```
    """
    rows = kept_rows(scores, cut)
    checks = iter(scores.check[rows].tolist())
    for seen, line in lines_at(shard, rows, scores.length):
        if checksum(seen) != next(checks):
            raise ValueError(f"{shard.place} changed while it was read: run again when nothing writes to it")
        kept.write(line if line.endswith(b"\n") else line + b"\n")
    reason = reason_of_kinds(scores.kinds, cut.check_images)
    for row in np.flatnonzero(np.append(reason >= 0, False)[scores.kind]).tolist():
        where = {"file": shard.place, "line": cut.first_line[scores.shard] + row + 1}
        line = json.dumps(where | {"reason": REASONS[reason[scores.kind[row]]]}, ensure_ascii=False)
        refused.write(line.encode() + b"\n")
    sources = scores.kinds["source"][scores.kind[rows]].tolist()
    runs = [(scores.sources[source], len(list(run))) for source, run in groupby(sources)]
    return KeptRows(summarize(scores, rows), runs, rows + cut.first_line[scores.shard])
