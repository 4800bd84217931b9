"""
Scores, the few bytes kept per row, and summaries, the small tables sent between processes. This module opens no files.

A score depends on three numbers of a rollout: how many steps are measured, how many are positive, and the sum of their
scores. When scores are k of 16 continuations, only a few distinct triples (kinds) occur, so a shard need only send how
many rollouts it has of each kind. Four rollouts of one source:

    scores of the steps   1.0 0.0         1.0 1.0         0.0             1.0 0.0
    kind (n, n_pos, sum)  (2, 1, 1.0)     (2, 2, 2.0)     (1, 0, 0.0)     (2, 1, 1.0)
    summary               2 of (2, 1, 1.0), 1 of (2, 2, 2.0), 1 of (1, 0, 0.0)
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
import pyarrow as pa

from ..data.rows import Reason


# The reasons for refusing a row, each numbered by its index here. `no_score`: no number where the rule looks for one.
REASONS = (*map(str, Reason), "no_score")

IMAGE_MISSING = REASONS.index(Reason.IMAGE_MISSING)

IMAGE_UNREADABLE = REASONS.index(Reason.IMAGE_UNREADABLE)

# `reason` is -1 for a usable row. `unread` is the reason if images are not looked for, or `NO_IMAGES` for a usable row
# without images.
NO_IMAGES = -2

KIND = np.dtype(
    [("source", "i4"), ("reason", "i1"), ("unread", "i1"), ("n_steps", "u4"), ("n_pos", "u4"), ("mc_sum", "f8")]
)

UNKNOWN = -1.0  # the mc_sum of rows whose step scores were not read

MAX_GROUPS = 2**16  # hashes of 8 bytes: half a megabyte per summary, its largest part


@dataclass(frozen=True)
class Summary:
    """
    A small description of a set of rows, independent of how the rows were divided and merged.

    Attributes:
        sources (`tuple[str]`): Names, sorted. Other fields refer to a source by its index here.
        kinds (`np.ndarray` of `KIND`): The distinct kinds of rows, sorted.
        count (`np.ndarray`): Number of rows of each kind.
        value (`np.ndarray`, *optional*): One more number per kind, if the rule reads further fields.
        groups (`dict`): (source, found its images) -> hashes of the image-question groups of its usable rows, at most
            `MAX_GROUPS` in total: those below `2**(64 - halved)`.
        halved (`int`): 0 if all groups are there; each increment leaves out half of them, by hash.
        lines (`dict`): shard -> (file, number of lines).
        first (`dict`): (reason, unread) -> (shard, line in it) of the first row refused with these reasons.
    """

    sources: tuple[str, ...]
    kinds: np.ndarray
    count: np.ndarray
    value: np.ndarray | None = None
    groups: dict[tuple[str, bool], np.ndarray] = field(default_factory=dict)
    halved: int = 0
    lines: dict[int, tuple[str, int]] = field(default_factory=dict)
    first: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Scores:
    """
    The few bytes kept per line of a shard.

    Attributes:
        shard (`int`), file (`str`), source (`str`): Where the lines are; `source` is the one given by the file name.
        sources (`tuple[str]`), kinds (`np.ndarray`), value (`np.ndarray`, *optional*): As in [`Summary`].
        kind (`np.ndarray` of int32): Index of each line in `kinds`; -1 for a blank line.
        group (`np.ndarray` of uint64): Hash of source, prompt and images of each line.
        length, check (`np.ndarray` of uint32, *optional*): Length in bytes of each line with its line end; checksum.
        drop_answer_step (`bool`): How the lines were scored.
        ids (`pa.Array`, *optional*): The `rollout_id` that each line carries, null where it has none.
        words (`np.ndarray`, *optional*): Number of words in the measured steps of each line.
    """

    shard: int
    file: str
    source: str
    sources: tuple[str, ...]
    kinds: np.ndarray
    kind: np.ndarray
    group: np.ndarray
    length: np.ndarray | None = None
    check: np.ndarray | None = None
    drop_answer_step: bool = False
    value: np.ndarray | None = None
    ids: pa.Array | None = None
    words: np.ndarray | None = None


def came_without_images(kinds: np.ndarray) -> bool:
    """Whether images are missing and none was found; rows without images do not count either way."""
    found = (kinds["reason"] < 0) & (kinds["unread"] != NO_IMAGES) | (kinds["reason"] == IMAGE_UNREADABLE)
    return bool((kinds["reason"] == IMAGE_MISSING).any() and not found.any())


def reason_of_kinds(kinds: np.ndarray, check_images: bool) -> np.ndarray:
    """For each kind the number of the reason for refusing it, -1 if it is usable."""
    return np.maximum(kinds["reason" if check_images else "unread"], -1)


def with_values(scores: Scores, value: np.ndarray) -> Scores:
    """
    Distinguish the lines by one more number each. NaN refuses an otherwise usable line as `no_score`.
    """
    no_score = np.isnan(value)
    line, kind = unique_rows([scores.kind, no_score, np.where(no_score, 0, value)])
    blank = int(len(line) and scores.kind[line[0]] < 0)  # blank lines are -1, and come first
    line, kind = line[blank:], kind - blank
    kinds = scores.kinds[scores.kind[line]]
    for name in ("reason", "unread"):
        kinds[name] = np.where(no_score[line] & (kinds[name] < 0), REASONS.index("no_score"), kinds[name])
    value = np.where(no_score, 0, value)[line]
    return replace(scores, kinds=kinds, kind=kind.astype(np.int32), value=value)


def summarize(scores: Scores, rows: np.ndarray | None = None) -> Summary:
    """
    Summarise a shard, or some of its rows.

    Args:
        scores ([`Scores`]):
            A scored shard.
        rows (`np.ndarray`, *optional*):
            Numbers of lines. Defaults to all lines that are not blank.
    """
    lines = {} if rows is not None else {scores.shard: (scores.file, len(scores.kind))}
    rows = np.flatnonzero(scores.kind >= 0) if rows is None else rows
    kind = scores.kind[rows]
    count = np.bincount(kind, minlength=len(scores.kinds))
    there = np.flatnonzero(count)
    usable = (scores.kinds["reason"] < 0) | (scores.kinds["unread"] < 0)
    key = np.where(usable, scores.kinds["source"] * 2 + (scores.kinds["reason"] < 0), -1)[kind]
    order = np.lexsort((scores.group[rows], key))
    key, group = key[order], scores.group[rows][order]
    new = np.ones(len(key), bool)
    new[1:] = (key[1:] != key[:-1]) | (group[1:] != group[:-1])
    values, starts = np.unique(key[new], return_index=True)
    groups = {
        (scores.sources[value // 2], bool(value % 2)): hashes
        for value, hashes in zip(values.tolist(), np.split(group[new], starts[1:]), strict=False)
        if value >= 0
    }
    first = {}
    if lines:
        lowest = np.full(len(scores.kinds), len(scores.kind))
        np.minimum.at(lowest, kind, rows)
        for (_, reason, unread, *_), line in zip(scores.kinds.tolist(), lowest.tolist(), strict=True):
            if reason >= 0:
                first[reason, unread] = min((scores.shard, line), first.get((reason, unread), (scores.shard, line)))
    summary = Summary(
        scores.sources,
        scores.kinds[there],
        count[there].astype(np.uint64),
        None if scores.value is None else scores.value[there],
        groups,
        0,
        lines,
        first,
    )
    return _merge([summary])


def merge(summaries: Iterable[Summary]) -> Summary:
    """
    Merge summaries into that of all rows together; order and grouping make no difference.

    Examples:
    ```python
    >>> import numpy as np
    >>> from trl_mprm.selection.summary import KIND, Summary, merge
    >>> one = Summary(("GEOS",), np.array([(0, -1, -1, 2, 1, 1.0)], KIND), np.array([3], np.uint64))
    >>> two = Summary(("AI2D", "GEOS"), np.array([(1, -1, -1, 2, 1, 1.0)], KIND), np.array([4], np.uint64))
    >>> merge([one, two]).sources, merge([two, one]).count.tolist()
    (('AI2D', 'GEOS'), [7])

    ```
    """
    summaries = iter(summaries)
    total = _merge(list(islice(summaries, 64)))
    while more := list(islice(summaries, 64)):
        total = _merge([total, *more])
    return total


def _merge(summaries: list[Summary]) -> Summary:
    sources = tuple(sorted({source for summary in summaries for source in summary.sources}))
    number = {source: index for index, source in enumerate(sources)}
    tables = []
    for summary in summaries:
        kinds = summary.kinds.copy()
        kinds["source"] = np.array([number[source] for source in summary.sources], np.int32)[kinds["source"]]
        tables.append(kinds)
    kinds = np.concatenate(tables) if tables else np.array([], KIND)
    count = np.concatenate([summary.count for summary in summaries]) if tables else np.array([], np.uint64)
    value = None
    if any(summary.value is not None for summary in summaries):
        value = np.concatenate([summary.value for summary in summaries])
    columns = [kinds[name] for name in KIND.names] + ([] if value is None else [value])
    kept, index = unique_rows(columns)
    count = np.bincount(index, count, len(kept)).astype(np.uint64)
    groups, halved = _merge_groups(summaries)
    lines = {shard: line for summary in summaries for shard, line in summary.lines.items()}
    first: dict[tuple[int, int], tuple[int, int]] = {}
    for summary in summaries:
        for key, line in summary.first.items():
            first[key] = min(line, first.get(key, line))
    return Summary(sources, kinds[kept], count, None if value is None else value[kept], groups, halved, lines, first)


def unique_rows(columns: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """
    The distinct rows of a table, sorted, and the index of each row among them.

    Examples:
    ```python
    >>> import numpy as np
    >>> from trl_mprm.selection.summary import unique_rows
    >>> [column.tolist() for column in unique_rows([np.array([1, 0, 1, 1]), np.array([2.0, 3.0, 1.0, 2.0])])]
    [[1, 2, 0], [2, 0, 1, 2]]

    ```
    """
    order = np.lexsort(columns[::-1])
    new = np.any([np.diff(column[order], prepend=np.nan) != 0 for column in columns], axis=0)
    index = np.empty(len(order), np.int64)
    index[order] = np.cumsum(new) - 1
    return order[new], index


def _merge_groups(summaries: list[Summary]) -> tuple[dict, int]:
    halved = max((summary.halved for summary in summaries), default=0)
    found: dict[tuple[str, bool], list[np.ndarray]] = {}
    for summary in summaries:
        for key, hashes in summary.groups.items():
            found.setdefault(key, []).append(hashes)
    groups = {}
    for key in sorted(found):
        hashes = np.sort(np.concatenate(found[key]))
        groups[key] = hashes[np.append(True, hashes[1:] != hashes[:-1])[: len(hashes)]]
    while True:
        if halved:
            end = np.uint64(2 ** (64 - halved))
            groups = {key: hashes[: np.searchsorted(hashes, end)] for key, hashes in groups.items()}
        if sum(map(len, groups.values())) <= MAX_GROUPS:
            return groups, halved
        halved += 1
