"""Read the reward of each step off a model."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F


def marker_logits(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], markers: torch.Tensor, token_ids: Sequence[int]
) -> torch.Tensor:
    """
    Logits of a few tokens at each marker, computed by one forward whose LM head sees the markers only.

    Args:
        model (`torch.nn.Module`):
            Model, possibly wrapped (PEFT, DDP, FSDP).
        inputs (`dict[str, torch.Tensor]`):
            What `forward` takes; `input_ids` of shape `(rows, tokens)`.
        markers (`torch.Tensor`):
            Bool mask of shape `(rows, tokens)`, True at each marker.
        token_ids (`Sequence[int]`):
            Tokens, the two reward tokens first.

    Returns:
        `torch.Tensor`: float32, shape `(markers.sum(), len(token_ids))`, in row order.
    """
    logits = model(**inputs, logits_to_keep=markers, use_cache="past_key_values" in inputs).logits
    if logits.ndim != 2:
        raise ValueError(
            f"expected logits at the {int(markers.sum())} markers only, got shape {tuple(logits.shape)}: this model's "
            "forward does not take a boolean `logits_to_keep` (transformers >= 5.21 native classes do)"
        )
    return logits[:, list(token_ids)].float()


def good_minus_bad(logits: torch.Tensor) -> torch.Tensor:
    """Logit of P(step good): that of the first reward token minus that of the second, shape `(steps,)`."""
    return logits[:, 0] - logits[:, 1]


CONCENTRATION_AT_START = 4.0

CONCENTRATION_FLOOR = 1e-3


def concentration(logits: torch.Tensor) -> torch.Tensor:
    """
    How sure a model trained with `beta_binomial` is of its mean, in continuations: 4 at logit 0, above 0 always.

    Examples:
    ```python
    >>> import torch
    >>> from trl_mprm.models.reader import concentration
    >>> concentration(torch.tensor([0.0, 10.0]))
    tensor([ 4.0010, 57.7091])

    ```
    """
    return CONCENTRATION_AT_START * F.softplus(logits.float()) / math.log(2) + CONCENTRATION_FLOOR
