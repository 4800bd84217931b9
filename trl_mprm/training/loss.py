"""
From step logits and Monte Carlo labels to the loss of a step.

    hard, soft        cross entropy over two reward tokens, with target 1[MC score > threshold] or the MC score itself
    beta_binomial     likelihood of the count: K good continuations of N, K ~ BetaBinomial(N, mean * c, (1 - mean) * c)

Every function returns one number a step; their mean is taken over the steps of the whole accumulated batch.
"""

import torch
import torch.nn.functional as F

from ..models.reader import concentration


LOSS_TYPES = ("hard", "soft", "beta_binomial")


def step_targets(labels: torch.Tensor, loss_type: str = "hard", threshold: float = 0.0) -> torch.Tensor:
    """
    Turn step labels into targets P(step good): `1[label > threshold]` if hard, else the label itself.

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
    return (labels > threshold).to(labels.dtype) if loss_type == "hard" else labels


def step_losses(step_logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """
    Cross entropy over the reward tokens, a step each.

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
    Negative log likelihood of the good continuations of each step, as of Beta-Binomial PRMs (arXiv 2605.15529).

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
            Of a high concentration where the mean is off: `penalty * |mean - K/N| * concentration`, which trains the
            concentration alone.

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
    Weigh losses by class; a soft target belongs to both classes in its share.

    Examples:
    ```python
    >>> import torch
    >>> from trl_mprm.training.loss import class_weighted
    >>> class_weighted(torch.ones(3), torch.tensor([1.0, 0.0, 0.25]), good=1.0, bad=5.0)
    tensor([1., 5., 4.])

    ```
    """
    return losses * (targets * good + (1 - targets) * bad)
