"""Label the steps of your own rollouts by Monte Carlo sampling."""

from .annotate import annotate


__all__ = ["annotate"]
