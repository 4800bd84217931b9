"""Step labels for your own rollouts, by Monte Carlo."""

from .annotate import annotate


__all__ = ["annotate"]
