"""
The Balanced-Information Score (BIS) of a rollout, in the paper's notation (arXiv 2602.04145, section 3).

    y_t    1 if the Monte Carlo score s_t > 0, else 0
    p_pos  (1/n) sum of y_t                               share of positive steps
    R      mean of s_t over the positive steps            reliability; 1 where no step is positive
    BIS    (p_pos * (1 - p_pos) + alpha) * R

    scores .5625 .6875 .6875 .0625 0 0 0 0  ->  p_pos = 4/8, R = 2/4, BIS = (0.5 * 0.5 + 0.05) * 0.5 = 0.15
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ..data.rows import measured as is_measured


# Part of the fingerprint of `map(add_bis)`: raise it whenever the computed scores change, or stale caches are used.
BIS_VERSION = "3"

# The paper pairs 0.2 with the top 10% and 0.05 with the top 25%; in our studies alpha decided at 10% (77.2 F1 for 0.2
# and 57.4 for 0.05 in the first, 89.4 and 81.6 in the second), and in the first it hardly mattered at 25%.
ALPHA = 0.2


def balanced_information(scores: np.ndarray, offsets: np.ndarray, alpha: float = ALPHA) -> dict[str, np.ndarray]:
    """
    Score many rollouts at once.

    Args:
        scores (`np.ndarray`, float64):
            Monte Carlo scores of all measured steps of all rollouts, one after the other. NaN marks a broken score.
        offsets (`np.ndarray`, int64):
            Rollout `i` owns `scores[offsets[i]:offsets[i + 1]]`.
        alpha (`float`, *optional*, defaults to `0.2`):
            The paper's alpha, at least 0. The paper uses 0.05 for the top 25% and 0.2 for the top 10%.

    Returns:
        `dict` of arrays with one entry per rollout: `bis`, `bis_p_pos`, `bis_reliability` (NaN where the rollout has no
        measured step, or a score that is not a number in [0, 1]), `bis_n_steps` (measured steps, the paper's n), and
        `n_pos`, `mc_sum` (positive steps and sum of scores).

    Examples:
    ```python
    >>> import numpy as np
    >>> from trl_mprm.selection.bis import balanced_information
    >>> scores = [0.5625, 0.6875, 0.6875, 0.0625, 0.0, 0.0, 0.0, 0.0, 1.0]
    >>> balanced_information(np.array(scores), np.array([0, 8, 9]), alpha=0.05)["bis"].tolist()
    [0.15, 0.05]

    ```
    """
    n_steps, n_pos, mc_sum, valid = step_sums(scores, offsets)
    columns = score_of_sums(n_steps, n_pos, mc_sum, alpha)
    columns = {name: np.where(valid, column, np.nan) for name, column in columns.items()}
    return columns | {"bis_n_steps": n_steps, "n_pos": n_pos, "mc_sum": mc_sum}


def step_sums(scores: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """
    Compute for each rollout the three numbers that every rule needs, and whether it can be scored at all.

    Examples:
    ```python
    >>> import numpy as np
    >>> from trl_mprm.selection.bis import step_sums
    >>> [column.tolist() for column in step_sums(np.array([0.5, 0.0, 2.0]), np.array([0, 2, 3]))]
    [[2, 1], [1, 0], [0.5, 0.0], [True, False]]

    ```
    """
    n_steps = np.diff(offsets)
    rollout = np.repeat(np.arange(n_steps.size), n_steps)
    in_range = (scores >= 0) & (scores <= 1)
    broken = np.bincount(rollout[~in_range], minlength=n_steps.size)
    positive = in_range & (scores > 0)
    n_pos = np.bincount(rollout[positive], minlength=n_steps.size)
    # bincount adds in step order, as the paper's loop does, so the sums agree to the last bit. Zeros and unmeasured
    # steps do not change a sum, so it is also the sum over all steps.
    mc_sum = np.bincount(rollout[positive], weights=scores[positive], minlength=n_steps.size)
    return n_steps, n_pos, mc_sum, (n_steps > 0) & (broken == 0)


def score_of_sums(n_steps: np.ndarray, n_pos: np.ndarray, mc_sum: np.ndarray, alpha: float) -> dict[str, np.ndarray]:
    """
    The paper's formula for rollouts with `n_steps` measured steps, `n_pos` of which have a score above 0.

    Examples:
    ```python
    >>> import numpy as np
    >>> from trl_mprm.selection.bis import score_of_sums
    >>> score_of_sums(np.array([8]), np.array([4]), np.array([2.0]), alpha=0.05)["bis"].tolist()
    [0.15]

    ```
    """
    check_alpha(alpha)
    p_pos = n_pos / np.maximum(n_steps, 1)
    reliability = np.where(n_pos > 0, mc_sum / np.maximum(n_pos, 1), 1.0)
    bis = (p_pos * (1 - p_pos) + alpha) * reliability
    return {"bis": bis, "bis_p_pos": p_pos, "bis_reliability": reliability}


def check_alpha(alpha: float) -> None:
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha must be a number of at least 0 (the paper uses 0.05 and 0.2), got {alpha!r}")


def step_scores(batch: pa.Table | Mapping) -> tuple[np.ndarray, np.ndarray]:
    """
    The measured scores of a batch of rollouts as `(scores, offsets)`, from `mc_scores` or raw `steps_with_score`.

    A null in `mc_scores`, or `num_mc_total` 0 in a raw step, means "not measured": the step is left out. Anything
    else that is not a number (a quoted score, a bool, a raw step without score) becomes NaN, which makes its rollout
    invalid.
    """
    names = batch.column_names if isinstance(batch, pa.Table) else batch
    name = next((name for name in ("mc_scores", "steps_with_score") if name in names), None)
    if name is None:
        raise ValueError(
            f"expected a column `mc_scores` or `steps_with_score`, got {list(names)}: read the rows with load_rollouts"
        )
    if isinstance(batch, pa.Table):
        return _scores_from_arrow(batch[name], raw=name == "steps_with_score")
    read = _raw_scores if name == "steps_with_score" else _plain_scores
    rows = [read(steps or []) for steps in batch[name]]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)]).astype(np.int64)
    return np.array([score for row in rows for score in row], dtype=np.float64), offsets


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else float("nan")


def _plain_scores(steps: list) -> list[float]:
    return [_number(score) for score in steps if score is not None]


def _raw_scores(steps: list[dict]) -> list[float]:
    steps = [step if isinstance(step, dict) else {} for step in steps]  # {}: a step without a score is invalid
    return [_number(step.get("score")) for step in steps if is_measured(step.get("num_mc_total"))]


def _scores_from_arrow(column: pa.ChunkedArray, raw: bool) -> tuple[np.ndarray, np.ndarray]:
    import pyarrow.compute as pc  # takes a tenth of a second, and a selection from files does without it

    if pa.types.is_null(column.type):  # no row has any
        column = column.cast(pa.list_(pa.float64()))
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        raise ValueError(f"expected a column of lists, one score (or one raw step) per step, got {column.type}")
    steps = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    rollout, flat = pc.list_parent_indices(steps).to_numpy(), pc.list_flatten(steps)
    if raw:
        fields = {field.name for field in flat.type} if pa.types.is_struct(flat.type) else set()
        measured = np.ones(len(flat), bool)
        if "num_mc_total" in fields:
            total = pc.struct_field(flat, "num_mc_total")
            if pa.types.is_floating(total.type) or pa.types.is_integer(total.type):
                measured = pc.fill_null(pc.not_equal(total, pa.scalar(0, total.type)), True).to_numpy(False)
            else:
                measured = np.array([is_measured(value) for value in total.to_pylist()], bool)
        flat = pc.struct_field(flat, "score") if "score" in fields else pa.nulls(len(flat))
    else:
        measured = flat.is_valid().to_numpy(False)
    if pa.types.is_floating(flat.type) or pa.types.is_integer(flat.type):
        scores = flat.cast(pa.float64()).fill_null(float("nan")).to_numpy(False)
    else:
        scores = np.full(len(flat), np.nan)
    n_steps = np.bincount(rollout[measured], minlength=len(steps))
    return scores[measured], np.concatenate([[0], np.cumsum(n_steps)]).astype(np.int64)


@dataclass(frozen=True)
class _AddBIS:
    """
    Add the Balanced-Information Score of a rollout as columns `bis`, `bis_p_pos`, `bis_reliability`, `bis_n_steps`.

    Works as `map(add_bis)`, `map(add_bis, batched=True)`, on `with_format("arrow")`, and on an `IterableDataset`, with
    equal results. Other formats (numpy, torch, pandas, polars) are refused; call `with_format(None)` first. Reads
    `mc_scores` (null: step not measured) or raw `steps_with_score`. A rollout that cannot be scored (no measured step,
    or a score that is not a number in [0, 1]) gets nulls in the first three columns.

    Args:
        row (`dict` or `pa.Table`):
            One row, a batch of rows, or an Arrow table. For dicts only the new columns are returned, as `map` expects;
            for a table the whole table is returned, because `map` replaces the batch with it.
        alpha (`float`, *optional*, defaults to `0.2`):
            The paper's alpha, at least 0.

    Examples:
    ```python
    >>> from trl_mprm import add_bis
    >>> add_bis({"mc_scores": [0.5625, 0.6875, 0.6875, 0.0625, 0.0, 0.0, 0.0, 0.0]}, alpha=0.05)
    {'bis': 0.15, 'bis_p_pos': 0.5, 'bis_reliability': 0.5, 'bis_n_steps': 8}

    ```
    """

    # `datasets` hashes an importable function by its name alone, so that a cache outlives a change of the code. An
    # object is hashed with its fields, and this one carries the version.
    version: str = BIS_VERSION

    def __call__(self, row: Mapping | pa.Table, alpha: float = ALPHA) -> dict | pa.Table:
        if not isinstance(row, (Mapping, pa.Table)):
            raise _other_format(row)
        one = isinstance(row, Mapping) and not _is_batch(row)
        if one:
            row = {name: [row[name]] for name in ("mc_scores", "steps_with_score") if name in row}
        columns = balanced_information(*step_scores(row), alpha)
        columns = {
            name: pa.array(columns[name], pa.int64() if name == "bis_n_steps" else pa.float64(), from_pandas=True)
            for name in ("bis", "bis_p_pos", "bis_reliability", "bis_n_steps")
        }  # from_pandas: NaN becomes null
        if isinstance(row, pa.Table):
            for name, column in columns.items():
                row = row.drop_columns(name) if name in row.column_names else row
                row = row.append_column(name, column)
            return row
        return {name: column[0].as_py() if one else column.to_pylist() for name, column in columns.items()}


def _other_format(got: object) -> ValueError:
    """In numpy, torch and pandas a step that was not measured and an invalid score are both NaN, hence the refusal."""
    return ValueError(
        f"add_bis reads rows as plain lists or as Arrow tables, got {type(got).__name__}: call "
        "dataset.with_format(None) first (batched=True is as fast)"
    )


def _is_batch(row: Mapping) -> bool:
    steps = row["mc_scores"] if "mc_scores" in row else row["steps_with_score"] if "steps_with_score" in row else None
    if steps is not None and not isinstance(steps, list):
        raise _other_format(steps)
    kinds = {type(step) for step in steps or [] if step is not None}
    if odd := kinds - {list, dict, int, float, bool, str}:
        raise _other_format(next(step for step in steps if type(step) in odd))
    if kinds:
        return list in kinds
    # No step, or only nulls, can be a row without a score or a batch of rows without steps; another column decides.
    return any(isinstance(row[name], list) for name in ("rollout_id", "source") if name in row)


add_bis = _AddBIS()
