"""
The arithmetic of a cut: small summaries -> one cut -> row numbers. This module opens no files.

Four rollouts of one source, rule `bis` at alpha 0.05, fraction 0.5:

    scores of the steps   kind (n, n_pos, sum)   BIS     kept
    1.0 0.0               (2, 1, 1.0)            0.30    yes, above the cut
    1.0 1.0               (2, 2, 2.0)            0.05    the first of the ties at the cut
    0.0                   (1, 0, 0.0)            0.05    no: the quota int(4 * 0.5) is full
    0.5 0.5               (2, 2, 1.0)            0.025   no

The cut follows exactly from the number of rollouts of each kind. Only rollouts tied at the cut need a second look
(`settle`). A *stratum* is a set of rows with its own cut: a source, or with `by=None` the whole corpus.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from .rules import CutSpec, score_of_kinds
from .summary import Scores, Summary, came_without_images, reason_of_kinds


ALL = np.uint64(2**64 - 1)


@dataclass(frozen=True)
class Cut:
    """
    The decision which rows are kept: made by [`find_cut`], completed by [`settle`], applied by [`kept_rows`].

    Attributes:
        spec ([`~trl_mprm.selection.rules.CutSpec`]): The request.
        check_images (`bool`): False if not one image was found and no image root was given.
        sources (`tuple[str]`): Names, sorted.
        stratum (`np.ndarray`): The stratum of each source: one per source, or one for all. The arrays below have one
            entry per stratum.
        valid, cut_score, ties, ties_kept: Usable rows, lowest kept score, rows with that score, and how many of these
            are kept.
        first_line (`dict`): shard -> number of its first line in its file.
        limit (`np.ndarray` of uint64): Ties with a smaller hash are kept. With `ties="first"` all hashes are 0.
        equal (`dict`): shard -> how many ties with exactly that hash are kept, the first ones.
        window (`tuple`, *optional*): Bounds of the limits, as long as they are not settled.
    """

    spec: CutSpec
    check_images: bool
    sources: tuple[str, ...]
    stratum: np.ndarray
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
    """A shard's ties by stratum: the number with a hash below the window of a cut, and the hashes inside with counts."""

    shard: int
    below: np.ndarray
    inside: dict[int, tuple[np.ndarray, np.ndarray]]


def find_cut(summary: Summary, spec: CutSpec, *, images_required: bool = False) -> Cut:
    """
    Find the cut of each stratum, which keeps the `max(1, int(m * fraction))` highest-scoring of its `m` usable rows.

    Args:
        summary ([`~trl_mprm.selection.summary.Summary`]):
            Summary of all rows of the corpus.
        spec ([`~trl_mprm.selection.rules.CutSpec`]):
            The request.
        images_required (`bool`, *optional*, defaults to `False`):
            Refuse rows whose images are missing even if all images are missing.

    Returns:
        [`Cut`]: It is not settled if some ties are kept and others not.
    """
    kinds, stratum = summary.kinds, np.arange(len(summary.sources))
    stratum = stratum * 0 if spec.by is None else stratum
    n_strata = len(set(stratum.tolist()))
    check_images = images_required or not came_without_images(kinds)
    usable = np.flatnonzero(reason_of_kinds(kinds, check_images) < 0)
    score = score_of_kinds(spec, kinds, summary.value)[usable]
    mine, count = stratum[kinds["source"][usable]], summary.count[usable].astype(np.int64)
    valid = np.bincount(mine, count, n_strata).astype(np.int64)
    cut_score, at_cut, kept = np.full(n_strata, np.nan), np.zeros(n_strata, np.int64), np.zeros(n_strata, np.int64)
    order = np.lexsort((-score, mine))
    ends = np.searchsorted(mine[order], np.arange(n_strata + 1))
    for number in np.flatnonzero(valid):
        rows = order[ends[number] : ends[number + 1]]
        quota = max(1, int(int(valid[number]) * spec.fraction))
        cut_score[number] = score[rows][np.searchsorted(np.cumsum(count[rows]), quota)]
        above, at = score[rows] > cut_score[number], score[rows] == cut_score[number]
        at_cut[number] = count[rows][at].sum()
        kept[number] = quota - count[rows][above].sum()
    cut = Cut(
        spec,
        check_images,
        summary.sources,
        stratum,
        valid,
        cut_score,
        at_cut,
        kept,
        _first_lines(summary),
        limit=np.full(n_strata, ALL),
        equal={},
        window=None,
    )
    return cut if (kept == at_cut).all() else replace(cut, window=_window(cut))


def _first_lines(summary: Summary) -> dict[int, int]:
    first_line, lines = {}, Counter()
    for shard, (file, n_lines) in sorted(summary.lines.items()):
        first_line[shard] = lines[file]
        lines[file] += n_lines
    return first_line


# Half the width of a window, in standard deviations of the number of hashes below its middle. At 8 the limit lies outside
# in fewer than one of 10**14 cuts, and `settle` then searches everywhere.
WINDOW_WIDTH = 8

# Up to this many ties, all of their hashes are sent, 16 bytes each.
FEW_TIES = 1000


def _window(cut: Cut) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of the limits. Hashes are spread evenly, so the k-th of n is near k / n."""
    low, high = np.zeros(len(cut.valid), np.uint64), np.full(len(cut.valid), ALL)
    if cut.spec.ties == "first":
        return low, np.zeros_like(high)
    for number in np.flatnonzero(cut.ties > FEW_TIES):
        n, k = int(cut.ties[number]), int(cut.ties_kept[number])
        spread = WINDOW_WIDTH * math.sqrt(k * (n - k) / n) + WINDOW_WIDTH
        low[number] = max(0, int((k - spread) / n * 2**64))
        high[number] = min(2**64 - 1, int((k + spread) / n * 2**64))
    return low, high


def tie_counts(scores: Scores, cut: Cut) -> Ties:
    """The few kilobytes about a shard's ties that [`settle`] needs."""
    low, high = cut.window
    below, inside = np.zeros(len(cut.valid), np.int64), {}
    for number, rows in _tied(scores, cut):
        hashes = _hashes(scores, rows, cut)
        below[number] = (hashes < low[number]).sum()
        inside[number] = np.unique(hashes[(hashes >= low[number]) & (hashes <= high[number])], return_counts=True)
    return Ties(scores.shard, below, inside)


def settle(cut: Cut, ties: Iterable[Ties]) -> Cut:
    """Find the hash that separates kept from dropped ties. Call again while `cut.settled` is false."""
    ties = sorted(ties, key=lambda shard: shard.shard)
    limit, missed = cut.limit.copy(), False
    equal = {shard.shard: np.zeros(len(cut.valid), np.int64) for shard in ties}
    for number in np.flatnonzero(cut.ties_kept < cut.ties):
        none = (np.array([], np.uint64), np.array([], np.int64))
        inside = [shard.inside.get(number, none) for shard in ties]
        hashes = np.concatenate([values for values, _ in inside])
        counts = np.concatenate([count for _, count in inside])
        order = np.argsort(hashes, kind="stable")
        left = cut.ties_kept[number] - sum(shard.below[number] for shard in ties)
        last = np.searchsorted(np.cumsum(counts[order]), left)
        if left <= 0 or last == len(order):
            missed = True
            continue
        limit[number] = hashes[order[last]]
        left -= counts[hashes < limit[number]].sum()
        for shard, (values, count) in zip(
            ties, inside, strict=True
        ):  # of equal hashes the first rows are kept, shard by shard
            equal[shard.shard][number] = min(left, count[values == limit[number]].sum())
            left -= equal[shard.shard][number]
    if missed:  # hashes that are not spread evenly, such as those of one repeated id: search everywhere
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
    """For each kind 2 if it is above the cut, 1 at the cut, 0 below it or refused."""
    cut_score = cut.cut_score[_strata(scores, cut)]
    score = score_of_kinds(cut.spec, scores.kinds, scores.value)
    state = np.where(score > cut_score, 2, np.where(score == cut_score, 1, 0))
    return np.where(reason_of_kinds(scores.kinds, cut.check_images) < 0, state, 0)


def _strata(scores: Scores, cut: Cut) -> np.ndarray:
    """The stratum of each kind."""
    number = {source: index for index, source in enumerate(cut.sources)}
    return cut.stratum[[number[source] for source in scores.sources]][scores.kinds["source"]]


def _tied(scores: Scores, cut: Cut) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each stratum and its lines at the cut score, ascending."""
    stratum = np.append(np.where(_states(scores, cut) == 1, _strata(scores, cut), -1), -1)[scores.kind]
    rows = np.flatnonzero(stratum >= 0)
    rows = rows[np.argsort(stratum[rows], kind="stable")]
    numbers, starts = np.unique(stratum[rows], return_index=True)
    yield from zip(numbers.tolist(), np.split(rows, starts[1:]), strict=False)


def _hashes(scores: Scores, rows: np.ndarray, cut: Cut) -> np.ndarray:
    if cut.spec.ties == "first":
        return np.zeros(len(rows), np.uint64)
    first, seed = cut.first_line[scores.shard], cut.spec.seed
    own = [None] * len(rows) if scores.ids is None else scores.ids.take(pa.array(rows)).to_pylist()
    names = (
        f"{seed}:{scores.source}:{first + row}" if name is None else f"{seed}:{name}"
        for row, name in zip(rows.tolist(), own, strict=True)
    )
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names)
    return np.frombuffer(digests, ">u8").astype(np.uint64)
