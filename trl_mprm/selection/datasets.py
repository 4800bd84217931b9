"""
Keep the exact top fraction of each source by a rule of [`~trl_mprm.selection.rules`], with evidence.

A rule gives each rollout a score. Every rule keeps the `max(1, int(m * fraction))` highest-scoring of the `m` valid
rollouts of each source, or of the whole corpus.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import xxhash
from datasets import Dataset, IterableDataset

from .bis import ALPHA, step_scores, step_sums
from .lines import group_hash
from .report import SELECTION_VERSION, all_wrong_warning, build_report
from .rules import CutSpec
from .summary import KIND, REASONS, UNKNOWN, Scores, summarize
from .threshold import find_cut, kept_rows, settle, tie_counts


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Selection:
    """
    The rollouts that a rule kept. Called with a row, a batch or an Arrow table, it says which rows are kept, as in
    `dataset.filter(selection, batched=True)`. It is picklable and has the same fingerprint in every process.

    Attributes:
        kept (`tuple[str]`): `rollout_id` of the kept rollouts, in file order.
        indices (`tuple[int]`): Their row numbers: `dataset.select(selection.indices)`.
        report (`dict`): Content of `selection.json`: rule, parameters, and for each source the counts and the cut.
    """

    kept: tuple[str, ...]
    indices: tuple[int, ...]
    report: dict = field(repr=False)
    version: str = SELECTION_VERSION

    def __post_init__(self):
        object.__setattr__(self, "_kept", frozenset(self.kept))

    def __reduce__(self):  # without the set, whose order, and hence pickle, differs from process to process
        return Selection, (self.kept, self.indices, self.report, self.version)

    def __call__(self, row: dict | pa.Table) -> bool | list[bool] | pa.Array:
        ids = row["rollout_id"]
        if isinstance(row, pa.Table):
            return pa.array([rollout_id in self._kept for rollout_id in ids.to_pylist()], pa.bool_())
        return ids in self._kept if isinstance(ids, str) else [rollout_id in self._kept for rollout_id in ids]


def top_fraction(
    scored: Dataset | IterableDataset,
    fraction: float,
    *,
    by: str | None = "source",
    score: str = "bis",
    ties: str = "first",
    seed: int = 0,
) -> Selection:
    """
    Keep exactly `max(1, int(m * fraction))` of the `m` rollouts of each source that have a score.

    The product is a floating-point one, as in the paper's script: 0.29 of 100 rollouts is 28, because `100 * 0.29` is
    28.999999999999996.

    Args:
        scored (`Dataset` or `IterableDataset`):
            Rows in any format, with a unique `rollout_id` and the columns `by` and `score`; see [`add_bis`]. A stream
            is read once.
        fraction (`float`):
            Share to keep, above 0 and at most 1.
        by (`str`, *optional*, defaults to `"source"`):
            The column whose values are each cut separately. None makes one cut over all rows; the report still lists
            each source.
        score (`str`, *optional*, defaults to `"bis"`):
            The column to rank by, highest first. Rows with null or NaN are not valid.
        ties (`str`, *optional*, defaults to `"first"`):
            How to choose among equal scores. `"first"` takes the rows that come first, as the paper's code does;
            `"hash"` goes by a seeded hash of `rollout_id`, independent of the order of the rows.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the hash.

    Returns:
        [`Selection`]: A predicate for `.filter(..., batched=True)`, with `.report`. Row by row it works too, but then
        `datasets` decodes every picture of the corpus, and does not filter the formats arrow and polars.

    Examples:
    ```python
    >>> from datasets import Dataset
    >>> from trl_mprm import top_fraction
    >>> rows = {"rollout_id": ["a", "b", "c", "d"], "source": ["x"] * 4, "bis": [0.05, 0.15, 0.05, None]}
    >>> best = top_fraction(Dataset.from_dict(rows), 0.7)  # int(3 * 0.7) = 2 of the 3 with a score
    >>> best.kept, best.report["total"]["ties_at_cut"], best.report["total"]["ties_kept"]
    (('a', 'b'), 2, 1)

    ```
    """
    return select(scored, "column", fraction=fraction, ties=ties, seed=seed, by=by, column=score)


def select(
    rollouts: Dataset | IterableDataset,
    rule: str = "bis",
    *,
    fraction: float,
    alpha: float = ALPHA,
    ties: str = "first",
    seed: int = 0,
    by: str | None = "source",
    column: str | None = None,
) -> Selection:
    """
    Keep the top `fraction` of each source, or with `by=None` of all rows together, by one of the rules `bis`, `random`,
    `mixed`, `reliable`, `low_mc`, `column`.

    `select(rollouts, "bis", fraction=f, alpha=a)` keeps the same rows as
    `top_fraction(rollouts.map(add_bis, ...), f)`, and `select(rollouts, "column", fraction=f, column="bis")` is that
    `top_fraction`. The arguments are those of [`top_fraction`]; `alpha` is the paper's, for the rule `bis`; the rules
    `random` and `mixed` always break ties by the seeded hash.

    Examples:
    ```python
    >>> from datasets import Dataset
    >>> from trl_mprm import select
    >>> scores = [[1.0, 1.0], [0.75, 0.0], [0.25, 0.5]]
    >>> rows = Dataset.from_dict({"rollout_id": ["a", "b", "c"], "source": ["x"] * 3, "mc_scores": scores})
    >>> [select(rows, rule, fraction=0.34).kept for rule in ("bis", "mixed", "reliable", "low_mc")]
    [('b',), ('b',), ('a',), ('b',)]

    ```
    """
    spec = CutSpec(rule, fraction=fraction, alpha=alpha, ties=ties, seed=seed, by=by, column=column)
    ids, scores = _score_rows(_batches(rollouts, spec), spec)  # one shard
    summary = summarize(scores)
    cut = find_cut(summary, spec)
    while not cut.settled:
        cut = settle(cut, [tie_counts(scores, cut)])
    rows = kept_rows(scores, cut)
    kept = tuple(ids[row] for row in rows)
    revision = xxhash.xxh3_128_hexdigest("\n".join(kept).encode())
    report = build_report(cut, summary, summarize(scores, rows)) | {"revision": revision}
    if warning := all_wrong_warning(report):
        logger.warning(warning)
    return Selection(kept, tuple(rows.tolist()), report)


def _score_rows(batches: Iterable[dict], spec: CutSpec) -> tuple[list[str], Scores]:
    """Read the few numbers per row that a rule and its report need, in one pass."""
    ids, groups, kind = [], [], []
    numbers: dict[str, int] = {}
    kinds: dict[tuple, int] = {}
    for batch in batches:
        for name in ("rollout_id", spec.by, *_fields(spec)):
            if name is not None and name not in batch:
                raise ValueError(
                    f"expected a column {name!r}, got {list(batch)}: read the rows with load_rollouts and, to cut by "
                    "bis, map add_bis"
                )
        n_rows = len(batch["rollout_id"])
        prompts, images = batch.get("prompt", [None] * n_rows), batch.get("images", [None] * n_rows)
        sources = [str(source) for source in batch.get(spec.by or "source", ["all"] * n_rows)]
        ids += batch["rollout_id"]
        groups += [
            group_hash(source, prompt, row or ()) for source, prompt, row in zip(sources, prompts, images, strict=True)
        ]
        if not _fields(spec) or "mc_scores" in batch or "steps_with_score" in batch:
            n_steps, n_pos, mc_sum, valid = step_sums(*step_scores(batch))
        else:
            n_steps, n_pos, mc_sum, valid = np.zeros((4, n_rows), int)
            mc_sum = mc_sum + UNKNOWN
        values = np.zeros(n_rows)
        if _fields(spec):
            values = spec.entry.value(batch, spec)
            valid = ~np.isnan(values)
        number = [numbers.setdefault(source, len(numbers)) for source in sources]
        columns = (n_steps, n_pos, mc_sum, np.where(valid, values, 0))
        reason = np.where(valid, -1, REASONS.index("no_score")).tolist()
        for key in zip(number, reason, *(column.tolist() for column in columns), strict=True):
            kind.append(kinds.setdefault(key, len(kinds)))
    if not ids:
        raise ValueError("expected rollouts to select from, got no rows")
    _check_ids(ids)
    keys = [(source, reason, reason, *sums) for source, reason, *sums, _ in kinds]
    value = np.array([key[-1] for key in kinds]) if _fields(spec) else None
    kind, group = np.array(kind, np.int32), np.array(groups, np.uint64)
    scores = Scores(0, "", "", tuple(numbers), np.array(keys, KIND), kind, group, value=value)
    return ids, replace(scores, ids=pa.array(ids, pa.string()))


def _fields(spec: CutSpec) -> tuple[str, ...]:
    return () if spec.entry.reads is None else spec.entry.reads(spec)


def _check_ids(rollout_ids: list) -> None:
    seen: dict[str, int] = {}
    for row, rollout_id in enumerate(rollout_ids):
        if not isinstance(rollout_id, str) or seen.setdefault(rollout_id, row) != row:
            what = f"as row {seen[rollout_id]} has" if isinstance(rollout_id, str) else "which is no text"
            raise ValueError(
                f"row {row} has the rollout_id {rollout_id!r}, {what}, and kept rows are named by it: give unique "
                'ids, e.g. .map(lambda row, i: {"rollout_id": str(i)}, with_indices=True)'
            )


def _batches(rows: Dataset | IterableDataset, spec: CutSpec) -> Iterator[dict]:
    """The columns that `_score_rows` reads, as lists; images undecoded."""
    wanted = ("rollout_id", spec.by or "source", "mc_scores", "steps_with_score", "prompt", "images", *_fields(spec))
    if rows.column_names is not None:  # None: a stream after `map`, which learns its columns only when it runs
        rows = rows.select_columns([name for name in rows.column_names if name in wanted])
    if isinstance(rows, Dataset):
        yield from (table.to_pydict() for table in rows.with_format("arrow").iter(batch_size=1000))
        return
    rows = rows.with_format(None)
    yield from (rows if rows.features is None else rows.decode(False)).iter(batch_size=1000)
