"""
The arithmetic of a selection: rows -> a few bytes a row -> small summaries -> one cut -> row numbers. No files here.

Four rollouts of one source, rule `bis` at alpha 0.05, fraction 0.5:

    scores of the steps   kind (n, n_pos, sum)   BIS     kept
    1.0 0.0               (2, 1, 1.0)            0.30    yes, above the cut
    1.0 1.0               (2, 2, 2.0)            0.05    the first of the ties at the cut
    0.0                   (1, 0, 0.0)            0.05    no: the quota int(4 * 0.5) is full
    0.5 0.5               (2, 2, 1.0)            0.025   no

A score depends on three numbers of a rollout: the measured steps, the positive ones, and the sum of the scores. Few
different triples exist where a score is k of 16 continuations, so a shard tells the others how many rollouts it has of
each kind, and the cut follows exactly. Only the tied rollouts at the cut need a second look (`settle`).
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
import pyarrow as pa

from ..data.rows import Reason
from .rules import score_of_kinds


# What a row can be refused for; the place in this list is its number. `no_score`: a row of a dataset without score.
REASONS = (*map(str, Reason), "no_score")

IMAGE_MISSING = REASONS.index(Reason.IMAGE_MISSING)

# `reason` is -1 for a row that can be used; `unread` is what it is if images are not looked for.
KIND = np.dtype(
    [("source", "i4"), ("reason", "i1"), ("unread", "i1"), ("n_steps", "u4"), ("n_pos", "u4"), ("mc_sum", "f8")]
)

UNKNOWN = -1.0  # mc_sum of rows whose step scores were not read

MAX_GROUPS = 2**16

ALL = np.uint64(2**64 - 1)


@dataclass(frozen=True)
class Summary:
    """
    What a set of rows tells about itself: small, and the same however the rows were divided and put together again.

    Attributes:
        sources (`tuple[str]`): Names, sorted. Other fields name a source by its place here.
        kinds (`np.ndarray` of `KIND`): The kinds of rows there are, sorted.
        count (`np.ndarray`): How many rows each kind has.
        score (`np.ndarray`, *optional*): Score of each kind, where a column of the dataset gave it.
        groups (`dict`): (source, found its images) -> hashes of the image-question groups of its usable rows, at most
            `MAX_GROUPS` together: those below `2**(64 - halved)`.
        halved (`int`): 0 if all groups are there; each step leaves out half of them, by hash.
        lines (`dict`): shard -> (file, number of lines).
        first (`dict`): (reason, unread) -> (shard, line in it) of the first row that was refused so.
    """

    sources: tuple[str, ...]
    kinds: np.ndarray
    count: np.ndarray
    score: np.ndarray | None = None
    groups: dict[tuple[str, bool], np.ndarray] = field(default_factory=dict)
    halved: int = 0
    lines: dict[int, tuple[str, int]] = field(default_factory=dict)
    first: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Scores:
    """
    What is remembered of each line of a shard: a few bytes.

    Attributes:
        shard (`int`), file (`str`), source (`str`): Where the lines stand; `source` is the one by file name.
        sources (`tuple[str]`), kinds (`np.ndarray`), score (`np.ndarray`, *optional*): As in [`Summary`].
        kind (`np.ndarray` of int32): Place of each line in `kinds`; -1 for a blank line.
        group (`np.ndarray` of uint64): Hash of source, prompt and images of each line.
        length, check (`np.ndarray` of uint32, *optional*): Bytes of each line with its line end, and their checksum.
        drop_answer_step (`bool`): How the lines were scored.
        ids (`pa.Array`, *optional*): Own `rollout_id` of each line, null where it has none.
        words (`np.ndarray`, *optional*): Words of the measured steps of each line.
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
    score: np.ndarray | None = None
    ids: pa.Array | None = None
    words: np.ndarray | None = None


@dataclass(frozen=True)
class Cut:
    """
    Which rows are kept. Made by [`find_cut`], completed by [`settle`], applied by [`kept_rows`].

    Attributes:
        parameters (`dict`): rule, by, fraction, alpha, ties, seed.
        check_images (`bool`): False if no row at all found its images and no image root was given.
        sources (`tuple[str]`): Names, sorted.
        part (`np.ndarray`): Of each source, the part of the corpus that it is cut with: a part of its own, or one part
            for all. The arrays below have one entry a part.
        valid, cut_score, ties, ties_kept: Usable rows, lowest kept score, rows that have it, and how many are kept.
        first_line (`dict`): shard -> number of its first line in its file.
        limit (`np.ndarray` of uint64): Ties with a smaller hash are kept. With `ties="first"` all hashes are 0.
        equal (`dict`): shard -> how many ties with just that hash are kept, the first ones.
        window (`tuple`, *optional*): Where the limits lie, as long as they are not settled.
    """

    parameters: dict
    check_images: bool
    sources: tuple[str, ...]
    part: np.ndarray
    valid: np.ndarray
    cut_score: np.ndarray
    ties: np.ndarray
    ties_kept: np.ndarray
    first_line: dict[int, int]
    limit: np.ndarray
    equal: dict[int, np.ndarray]
    window: tuple[np.ndarray, np.ndarray] | None

    @property
    def settled(self) -> bool:
        return self.window is None


@dataclass(frozen=True)
class Ties:
    """Of one shard, by part: ties with a hash below the window of a cut, and the hashes inside with their counts."""

    shard: int
    below: np.ndarray
    inside: dict[int, tuple[np.ndarray, np.ndarray]]


def summarize(scores: Scores, rows: np.ndarray | None = None) -> Summary:
    """
    The summary of a shard, or of some of its rows.

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
    part = Summary(
        scores.sources,
        scores.kinds[there],
        count[there].astype(np.uint64),
        None if scores.score is None else scores.score[there],
        groups,
        0,
        lines,
        first,
    )
    return _merge([part])


def merge(summaries: Iterable[Summary]) -> Summary:
    """
    The summary of all rows together; the same in any order and any grouping.

    Examples:
    ```python
    >>> import numpy as np
    >>> from trl_mprm.selection.threshold import KIND, Summary, merge
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
    sources = tuple(sorted({source for part in summaries for source in part.sources}))
    place = {source: number for number, source in enumerate(sources)}
    tables = []
    for part in summaries:
        kinds = part.kinds.copy()
        kinds["source"] = np.array([place[source] for source in part.sources], np.int32)[kinds["source"]]
        tables.append(kinds)
    kinds = np.concatenate(tables) if tables else np.array([], KIND)
    count = np.concatenate([part.count for part in summaries]) if tables else np.array([], np.uint64)
    score = None
    if any(part.score is not None for part in summaries):
        score = np.concatenate([part.score for part in summaries])
    columns = [kinds[name] for name in KIND.names] + ([] if score is None else [score])
    kept, place = unique_rows(columns)
    count = np.bincount(place, count, len(kept)).astype(np.uint64)
    groups, halved = _merge_groups(summaries)
    lines = {shard: line for part in summaries for shard, line in part.lines.items()}
    refused: dict[tuple[int, int], tuple[int, int]] = {}
    for part in summaries:
        for key, place in part.first.items():
            refused[key] = min(place, refused.get(key, place))
    return Summary(sources, kinds[kept], count, None if score is None else score[kept], groups, halved, lines, refused)


def unique_rows(columns: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """
    One of each of the different rows of a table, sorted, and the place of each row among these.

    Examples:
    ```python
    >>> import numpy as np
    >>> from trl_mprm.selection.threshold import unique_rows
    >>> [column.tolist() for column in unique_rows([np.array([1, 0, 1, 1]), np.array([2.0, 3.0, 1.0, 2.0])])]
    [[1, 2, 0], [2, 0, 1, 2]]

    ```
    """
    order = np.lexsort(columns[::-1])
    new = np.any([np.diff(column[order], prepend=np.nan) != 0 for column in columns], axis=0)
    place = np.empty(len(order), np.int64)
    place[order] = np.cumsum(new) - 1
    return order[new], place


def _merge_groups(summaries: list[Summary]) -> tuple[dict, int]:
    halved = max((part.halved for part in summaries), default=0)
    parts: dict[tuple[str, bool], list[np.ndarray]] = {}
    for part in summaries:
        for key, hashes in part.groups.items():
            parts.setdefault(key, []).append(hashes)
    groups = {}
    for key in sorted(parts):
        hashes = np.sort(np.concatenate(parts[key]))
        groups[key] = hashes[np.append(True, hashes[1:] != hashes[:-1])[: len(hashes)]]
    while True:
        if halved:
            end = np.uint64(2 ** (64 - halved))
            groups = {key: hashes[: np.searchsorted(hashes, end)] for key, hashes in groups.items()}
        if sum(map(len, groups.values())) <= MAX_GROUPS:
            return groups, halved
        halved += 1


def find_cut(
    summary: Summary,
    rule: str,
    *,
    fraction: float,
    alpha: float = 0.05,
    ties: str = "first",
    seed: int = 0,
    by: str | None = "source",
    images_required: bool = False,
) -> Cut:
    """
    The cut of each part: `max(1, int(m * fraction))` of its `m` usable rows, the highest scores first.

    Args:
        summary ([`Summary`]):
            Of all rows of the corpus.
        rule (`str`):
            One of `RULES`, or the name of the column whose scores the summary holds.
        by (`str`, *optional*, defaults to `"source"`):
            What a source is, for the report: each is cut on its own. None: the whole corpus is one part.
        images_required (`bool`, *optional*, defaults to `False`):
            Refuse rows without their images even if not one row has them.

    Returns:
        [`Cut`]: Not settled where some ties are kept and others not.
    """
    ties = "hash" if rule in ("random", "mixed") else ties
    kinds, part = summary.kinds, np.arange(len(summary.sources))
    part = part * 0 if by is None else part
    n_parts = len(np.unique(part))
    # Not one usable row, and missing images the only fault of images: the annotations came without them.
    faults = {REASONS[reason] for reason in kinds["reason"] if reason >= 0 and REASONS[reason].startswith("image_")}
    check_images = images_required or bool((kinds["reason"] < 0).any()) or faults != {str(Reason.IMAGE_MISSING)}
    rows = np.flatnonzero(kinds["reason" if check_images else "unread"] < 0)
    score = score_of_kinds(rule, alpha, kinds, summary.score)[rows]
    row_part, count = part[kinds["source"][rows]], summary.count[rows].astype(np.int64)
    valid = np.bincount(row_part, count, n_parts).astype(np.int64)
    cut_score, at_cut, kept = np.full(n_parts, np.nan), np.zeros(n_parts, np.int64), np.zeros(n_parts, np.int64)
    order = np.lexsort((-score, row_part))
    ends = np.searchsorted(row_part[order], np.arange(n_parts + 1))
    for number in np.flatnonzero(valid):
        mine = order[ends[number] : ends[number + 1]]
        quota = max(1, int(int(valid[number]) * fraction))
        cut_score[number] = score[mine][np.searchsorted(np.cumsum(count[mine]), quota)]
        above, at = score[mine] > cut_score[number], score[mine] == cut_score[number]
        at_cut[number] = count[mine][at].sum()
        kept[number] = quota - count[mine][above].sum()
    first_line, lines = {}, Counter()
    for shard, (file, n_lines) in sorted(summary.lines.items()):
        first_line[shard] = lines[file]
        lines[file] += n_lines
    parameters = {"rule": rule, "by": by or "corpus", "fraction": fraction}
    cut = Cut(
        parameters | {"alpha": alpha if rule == "bis" else None, "ties": ties, "seed": seed},
        check_images,
        summary.sources,
        part,
        valid,
        cut_score,
        at_cut,
        kept,
        first_line,
        limit=np.full(n_parts, ALL),
        equal={},
        window=None,
    )
    return cut if (kept == at_cut).all() else replace(cut, window=_window(cut, width=8))


def _window(cut: Cut, width: float) -> tuple[np.ndarray, np.ndarray]:
    """Where the limits lie: hashes spread evenly, so the k-th of n is near k / n. `width` in standard deviations."""
    low, high = np.zeros(len(cut.valid), np.uint64), np.full(len(cut.valid), ALL)
    if cut.parameters["ties"] == "first":
        return low, np.zeros_like(high)
    for number in np.flatnonzero(cut.ties > 1000):
        n, k = int(cut.ties[number]), int(cut.ties_kept[number])
        spread = width * math.sqrt(k * (n - k) / n) + width
        low[number] = max(0, int((k - spread) / n * 2**64))
        high[number] = min(2**64 - 1, int((k + spread) / n * 2**64))
    return low, high


def tie_counts(scores: Scores, cut: Cut) -> Ties:
    """What [`settle`] needs to know of the ties of a shard: a few kilobytes."""
    low, high = cut.window
    below, inside = np.zeros(len(cut.valid), np.int64), {}
    for number, rows in _tied(scores, cut):
        hashes = _hashes(scores, rows, cut)
        below[number] = (hashes < low[number]).sum()
        inside[number] = np.unique(hashes[(hashes >= low[number]) & (hashes <= high[number])], return_counts=True)
    return Ties(scores.shard, below, inside)


def settle(cut: Cut, ties: Iterable[Ties]) -> Cut:
    """Find the hash that parts kept from dropped ties. Call again while `cut.settled` is false."""
    ties = sorted(ties, key=lambda part: part.shard)
    limit, missed = cut.limit.copy(), False
    equal = {part.shard: np.zeros(len(cut.valid), np.int64) for part in ties}
    for number in np.flatnonzero(cut.ties_kept < cut.ties):
        none = (np.array([], np.uint64), np.array([], np.int64))
        inside = [part.inside.get(number, none) for part in ties]
        hashes = np.concatenate([values for values, _ in inside])
        counts = np.concatenate([count for _, count in inside])
        order = np.argsort(hashes, kind="stable")
        left = cut.ties_kept[number] - sum(part.below[number] for part in ties)
        place = np.searchsorted(np.cumsum(counts[order]), left)
        if left <= 0 or place == len(order):
            missed = True
            continue
        limit[number] = hashes[order[place]]
        left -= counts[hashes < limit[number]].sum()
        for part, (values, count) in zip(ties, inside, strict=True):  # equal hashes: the first rows, shard by shard
            equal[part.shard][number] = min(left, count[values == limit[number]].sum())
            left -= equal[part.shard][number]
    if missed:  # hashes that do not spread evenly, such as those of one repeated id: look everywhere
        return replace(cut, window=(np.zeros_like(cut.limit), np.full_like(cut.limit, ALL)))
    return replace(cut, limit=limit, equal=equal, window=None)


def kept_rows(scores: Scores, cut: Cut) -> np.ndarray:
    """Numbers of the lines of a shard that are kept, ascending. The cut must be settled."""
    state = _states(scores, cut)
    keep = np.append(state == 2, False)[scores.kind]  # kind -1, a blank line, takes the last entry
    for number, rows in _tied(scores, cut):
        if cut.ties_kept[number] == cut.ties[number]:
            keep[rows] = True
            continue
        hashes = _hashes(scores, rows, cut)
        keep[rows[hashes < cut.limit[number]]] = True
        keep[rows[hashes == cut.limit[number]][: cut.equal[scores.shard][number]]] = True
    return np.flatnonzero(keep)


def _states(scores: Scores, cut: Cut) -> np.ndarray:
    """Of each kind: 2 above the cut, 1 at the cut, 0 below it or refused."""
    cut_score = cut.cut_score[_parts(scores, cut)]
    score = score_of_kinds(cut.parameters["rule"], cut.parameters["alpha"], scores.kinds, scores.score)
    state = np.where(score > cut_score, 2, np.where(score == cut_score, 1, 0))
    return np.where(scores.kinds["reason" if cut.check_images else "unread"] < 0, state, 0)


def _parts(scores: Scores, cut: Cut) -> np.ndarray:
    """Of each kind: the part of the corpus that it is in."""
    place = {source: number for number, source in enumerate(cut.sources)}
    return cut.part[[place[source] for source in scores.sources]][scores.kinds["source"]]


def _tied(scores: Scores, cut: Cut) -> Iterator[tuple[int, np.ndarray]]:
    """A part of the corpus, and its lines at the cut score, ascending."""
    part = np.append(np.where(_states(scores, cut) == 1, _parts(scores, cut), -1), -1)[scores.kind]
    rows = np.flatnonzero(part >= 0)
    rows = rows[np.argsort(part[rows], kind="stable")]
    numbers, starts = np.unique(part[rows], return_index=True)
    yield from zip(numbers.tolist(), np.split(rows, starts[1:]), strict=False)


def _hashes(scores: Scores, rows: np.ndarray, cut: Cut) -> np.ndarray:
    if cut.parameters["ties"] == "first":
        return np.zeros(len(rows), np.uint64)
    first, seed = cut.first_line[scores.shard], cut.parameters["seed"]
    own = [None] * len(rows) if scores.ids is None else scores.ids.take(pa.array(rows)).to_pylist()
    names = (
        f"{seed}:{scores.source}:{first + row}" if name is None else f"{seed}:{name}"
        for row, name in zip(rows.tolist(), own, strict=True)
    )
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names)
    return np.frombuffer(digests, ">u8").astype(np.uint64)
