"""Open a policy by its name."""

from collections.abc import Callable
from typing import Any

from .policies import CallablePolicy, Policy
from .server_policy import ServerPolicy


def open_policy(policy: str | Callable[..., list[str]] | Policy, workers: int = 8, **sampling: Any) -> Policy:
    """
    Open a policy: the URL of a server (`http://...`), the Hub id or folder of a model, or a callable.

    Args:
        policy (`str`, `Callable` or [`Policy`]):
            One of these, or a [`Policy`], which is returned unchanged.
        workers (`int`, *optional*, defaults to 8):
            Number of rollouts that a server continues at the same time.
        sampling:
            `temperature`, `top_p`, `top_k` and `max_new_tokens`, for a server or a model.
    """
    if isinstance(policy, Policy):
        return policy
    if callable(policy):
        if sampling:
            raise ValueError(f"a callable policy decides on its own sampling: leave out {', '.join(sampling)}")
        return CallablePolicy(policy)
    if not isinstance(policy, str):
        raise ValueError(f"policy is {policy!r:.80}, expected a model, the URL of a server, or a callable")
    if policy.startswith(("http://", "https://")):
        return ServerPolicy(policy, workers=workers, **sampling)
    from .model_policy import ModelPolicy  # here, so that a server does not wait for torch

    return ModelPolicy.from_pretrained(policy, **sampling)
