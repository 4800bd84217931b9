"""How the scores of steps become the score of a solution."""

import math
from collections.abc import Callable, Sequence


# How the scores of the steps of a candidate become the one score that best-of-N ranks by.
AGGREGATES: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": lambda scores: sum(scores) / len(scores),
    "min": min,
    "product": math.prod,
    "last": lambda scores: scores[-1],
}
