"""
Compute the loss of each step from its logits and Monte Carlo label.

    hard, soft        cross entropy over two reward tokens, with target 1[MC score > threshold] or the MC score itself
    beta_binomial     likelihood of the count: K good continuations of N, K ~ BetaBinomial(N, mean * c, (1 - mean) * c)

Every function returns one number per step; their mean is taken over the steps of the whole accumulated batch.

A loss is an entry of `LOSSES`, which the command line, the checks of data sets, the collator and the trainer read.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F

from ..data.rows import IGNORE_INDEX
from ..models.reader import concentration, good_minus_bad


@dataclass(frozen=True)
class StepLoss:
    """
    A loss, and the data that it needs from a row beside `labels`.

    Args:
        losses (`Callable`):
            Maps logits `(steps, tokens read)`, targets `(steps,)`, columns (`dict` of tensors `(steps,)`) and the
            configuration to losses `(steps,)`.
        targets (`Callable`):
            Maps labels `(steps,)` and `hard_threshold` to targets P(step good).
        columns (`tuple[str, ...]`, *optional*):
            Columns that a data set must have for this loss.
        of_row (`Callable`, *optional*):
            Maps a row and its name in errors to its labels and to the columns of `losses`, each with one number per
            step. Raises `ValueError` for a row that the loss cannot use.
        fits (`Callable`, *optional*):
            Whether `of_row` accepts all rows of a table whose labels are valid, judged by whole columns.
        reads_marker (`bool`, *optional*, defaults to `False`):
            Whether the third logit, that of the marker, is read; a classification head has none.
    """

    losses: Callable[[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], Any], torch.Tensor]
    targets: Callable[[torch.Tensor, float], torch.Tensor]
    columns: tuple[str, ...] = ()
    of_row: Callable[[dict[str, Any], str], tuple[list[float], dict[str, list[float]]]] = lambda row, name: (
        row["labels"],
        {},
    )
    fits: Callable[[pa.Table], bool] = lambda table: True
    reads_marker: bool = False


def weighted_losses(
    logits: torch.Tensor, labels: torch.Tensor, columns: dict[str, torch.Tensor], config: Any
) -> torch.Tensor:
    """
    Compute the losses of the steps of a batch, weighted by class and by row.

    Args:
        logits (`torch.Tensor`):
            From [`~reader.StepReader.read`], shape `(steps, tokens read)`.
        labels (`torch.Tensor`):
            Labels of the same steps, shape `(steps,)`.
        columns (`dict[str, torch.Tensor]`):
            Columns that the collator keeps for the loss, shape `(steps,)` each, including `row_weights` if rows have
            different weights.
        config ([`ProcessRewardConfig`]):
            Provides `loss_type`, `hard_threshold`, `class_weights`, and the settings of the loss itself.
    """
    loss = LOSSES[config.loss_type]
    targets = loss.targets(labels, config.hard_threshold)
    losses = loss.losses(logits, targets, columns, config)
    if config.class_weights is not None:
        losses = class_weighted(losses, targets, *config.class_weights)
    return losses * columns["row_weights"] if "row_weights" in columns else losses


def step_targets(labels: torch.Tensor, loss_type: str = "hard", threshold: float = 0.0) -> torch.Tensor:
    """
    Turn step labels into targets P(step good): `1[label > threshold]` for `"hard"`, otherwise the label itself.

    Args:
        labels (`torch.Tensor`):
            Monte Carlo scores, or 0 and 1, shape `(steps,)`.
        loss_type (`str`, *optional*, defaults to `"hard"`):
            `"hard"`, `"soft"` or `"beta_binomial"`.
        threshold (`float`, *optional*, defaults to `0.0`):
            Threshold of the hard label. The paper's Table 2 also tries 1/N and 2/N, N = 16.

    Examples:
    ```python
    >>> import torch
    >>> from trl_mprm.training.loss import step_targets
    >>> step_targets(torch.tensor([0.0, 0.0625, 1.0]))
    tensor([0., 1., 1.])
    >>> step_targets(torch.tensor([0.0, 0.0625, 1.0]), loss_type="soft")
    tensor([0.0000, 0.0625, 1.0000])

    ```
    """
    return LOSSES[loss_type].targets(labels, threshold)


def step_losses(step_logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """
    Cross entropy over the reward tokens, one value per step.

    The paper's two-way cross entropy with target `[p, 1 - p]` over the logits of "Yes" and "No" depends on their
    difference alone, so it is binary cross entropy on `step_logits = logit(Yes) - logit(No)`.

    Args:
        step_logits (`torch.Tensor`):
            Logit of P(step good), shape `(steps,)`.
        targets (`torch.Tensor`):
            P(step good) to learn, in [0, 1], shape `(steps,)`.

    Examples:
    ```python
    >>> import torch
    >>> from trl_mprm.training.loss import step_losses
    >>> step_losses(torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.3]))  # ln 2 each
    tensor([0.6931, 0.6931])

    ```
    """
    return F.binary_cross_entropy_with_logits(step_logits.float(), targets.float(), reduction="none")


def beta_binomial_losses(
    step_logits: torch.Tensor,
    concentration_logits: torch.Tensor,
    labels: torch.Tensor,
    totals: torch.Tensor,
    penalty: float = 0.05,
) -> torch.Tensor:
    """
    Negative log likelihood of each step's count of good continuations, as in Beta-Binomial PRMs (arXiv 2605.15529).

    Args:
        step_logits (`torch.Tensor`):
            Logit of the mean, P(step good), shape `(steps,)`.
        concentration_logits (`torch.Tensor`):
            See [`concentration`], same shape.
        labels (`torch.Tensor`):
            Monte Carlo scores K/N, same shape.
        totals (`torch.Tensor`):
            N of each step, same shape.
        penalty (`float`, *optional*, defaults to `0.05`):
            Weight of the penalty on high concentration where the mean is off, `penalty * |mean - K/N| * concentration`,
            which trains only the concentration.

    Examples:
    ```python
    >>> import torch
    >>> from trl_mprm.training.loss import beta_binomial_losses
    >>> # Mean 1/2 and a concentration of 4: Beta(2, 2), under which 1 of 1 has probability 1/2.
    >>> beta_binomial_losses(*map(torch.tensor, ([0.0], [0.0], [1.0], [1.0])), penalty=0.0)
    tensor([0.6931])

    ```
    """
    totals = totals.float()
    counts = labels.float() * totals
    mean = step_logits.float().sigmoid().clamp(1e-6, 1 - 1e-6)
    strength = concentration(concentration_logits)
    good, bad = mean * strength, (1 - mean) * strength
    log_choose = torch.lgamma(totals + 1) - torch.lgamma(counts + 1) - torch.lgamma(totals - counts + 1)
    log_likelihood = log_choose + _log_beta(counts + good, totals - counts + bad) - _log_beta(good, bad)
    return penalty * (mean.detach() - labels).abs() * strength - log_likelihood


def _log_beta(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return torch.lgamma(first) + torch.lgamma(second) - torch.lgamma(first + second)


def class_weighted(losses: torch.Tensor, targets: torch.Tensor, good: float, bad: float) -> torch.Tensor:
    """
    Weight losses by class; a soft target belongs to both classes in proportion.

    Examples:
    ```python
    >>> import torch
    >>> from trl_mprm.training.loss import class_weighted
    >>> class_weighted(torch.ones(3), torch.tensor([1.0, 0.0, 0.25]), good=1.0, bad=5.0)
    tensor([1., 5., 4.])

    ```
    """
    return losses * (targets * good + (1 - targets) * bad)


def _counts_of_row(row: dict[str, Any], name: str) -> tuple[list[float], dict[str, list[float]]]:
    """Labels as shares K/N, and the total N of each step; raises `ValueError` if a labelled step has no count."""
    counts, total = row.get("mc_counts"), row.get("mc_total")
    if counts is None or not total or len(counts) != len(row["labels"]):
        raise ValueError(
            f'{name}: loss_type="beta_binomial" needs `mc_counts`, one per step, and `mc_total` above 0, '
            f"got {counts!r:.60} and {total!r}"
        )
    labels = []
    for number, (label, count) in enumerate(zip(row["labels"], counts, strict=True)):
        if label != IGNORE_INDEX and not (isinstance(count, int) and 0 <= count <= total):
            raise ValueError(f"{name}: count of step {number} is {count!r}, expected 0 to {total}")
        labels.append(IGNORE_INDEX if label == IGNORE_INDEX else count / total)
    return labels, {"mc_total": [float(total)] * len(labels)}


def _all_counts_fit(table: pa.Table) -> bool:
    """Whether the columns as a whole show that no row can fail [`_counts_of_row`]."""
    counts, totals = table["mc_counts"], table["mc_total"]
    lists = pa.types.is_list(counts.type) or pa.types.is_large_list(counts.type)
    if not lists or not pa.types.is_integer(counts.type.value_type) or counts.null_count or totals.null_count:
        return False
    labels, counts = table["labels"].combine_chunks(), counts.combine_chunks()
    if not pc.all(pc.equal(pc.list_value_length(counts), pc.list_value_length(labels))).as_py():
        return False
    values = pc.list_flatten(counts)
    total = totals.take(pc.list_parent_indices(counts))
    fits = pc.fill_null(pc.and_(pc.greater_equal(values, 0), pc.less_equal(values, total)), False)
    ignored = pc.equal(pc.list_flatten(labels).cast(pa.float64()), IGNORE_INDEX)
    return pc.all(pc.greater(totals, 0)).as_py() and pc.all(pc.or_(fits, ignored)).as_py()


LOSSES = {
    "hard": StepLoss(
        losses=lambda logits, targets, columns, config: step_losses(good_minus_bad(logits), targets),
        targets=lambda labels, threshold: (labels > threshold).to(labels.dtype),
    ),
    "soft": StepLoss(
        losses=lambda logits, targets, columns, config: step_losses(good_minus_bad(logits), targets),
        targets=lambda labels, threshold: labels,
    ),
    "beta_binomial": StepLoss(
        losses=lambda logits, targets, columns, config: beta_binomial_losses(
            good_minus_bad(logits), logits[:, 2], targets, columns["mc_total"], config.concentration_penalty
        ),
        targets=lambda labels, threshold: labels,
        columns=("mc_counts", "mc_total"),
        of_row=_counts_of_row,
        fits=_all_counts_fit,
        reads_marker=True,
    ),
}
