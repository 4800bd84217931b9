"""Aggregates turn the scores of a solution's steps into one score of the solution."""

import math
from collections.abc import Callable, Sequence


AGGREGATES: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": lambda scores: sum(scores) / len(scores),
    "min": min,
    "product": math.prod,
    "last": lambda scores: scores[-1],
}
