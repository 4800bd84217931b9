"""Bootstrap over questions: measures of resampled questions, and the intervals that they span."""

from collections.abc import Callable

import numpy as np


def resample(overall: Callable, n_groups: int, n_resamples: int, seed: int) -> dict[str, np.ndarray]:
    """Values of the measures of `overall(weight)`, one per resample of the questions."""
    generator = np.random.default_rng(seed)
    draws = (generator.integers(0, n_groups, n_groups) for _ in range(n_resamples))
    samples = [overall(np.bincount(drawn, minlength=n_groups).astype(float)) for drawn in draws]
    return {name: np.array([sample[name] for sample in samples]) for name in (samples[0] if samples else ())}


def interval(values: np.ndarray, n_groups: int) -> list[float] | None:
    """95% percentile interval; undefined resamples are left out."""
    values = values[~np.isnan(values)]
    return np.quantile(values, (0.025, 0.975)).tolist() if n_groups > 1 and len(values) else None
