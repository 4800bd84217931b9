"""From step logits and Monte Carlo labels to the loss of the paper: cross entropy over two reward tokens."""

import torch
import torch.nn.functional as F


LOSS_TYPES = ("hard", "soft")


def step_targets(labels: torch.Tensor, loss_type: str = "hard", threshold: float = 0.0) -> torch.Tensor:
    """
    Turn step labels into targets P(step good): `1[label > threshold]` if hard, the label itself if soft.

    Args:
        labels (`torch.Tensor`):
            Monte Carlo scores, or 0 and 1, shape `(steps,)`.
        loss_type (`str`, *optional*, defaults to `"hard"`):
            `"hard"` or `"soft"`.
        threshold (`float`, *optional*, defaults to `0.0`):
            Threshold of the hard label. The paper's Table 2 also tries 1/N and 2/N, N = 16.

    Examples:
    ```python
    >>> import torch
    >>> from trl_mprm.loss import step_targets
    >>> step_targets(torch.tensor([0.0, 0.0625, 1.0]))
    tensor([0., 1., 1.])
    >>> step_targets(torch.tensor([0.0, 0.0625, 1.0]), loss_type="soft")
    tensor([0.0000, 0.0625, 1.0000])

    ```
    """
    return (labels > threshold).to(labels.dtype) if loss_type == "hard" else labels


def step_loss(step_logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """
    Sum of cross entropies over the reward tokens; divide by the steps of the whole accumulated batch.

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
    >>> from trl_mprm.loss import step_loss
    >>> step_loss(torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.3]))  # 2 ln 2
    tensor(1.3863)

    ```
    """
    return F.binary_cross_entropy_with_logits(step_logits.float(), targets.float(), reduction="sum")
