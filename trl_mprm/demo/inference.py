"""
What a few paired runs say: intervals, tests of superiority and of equivalence, and Holm's correction.

All differences are paired by seed (both runs saw the same data), in points of F1 x 100.
"""

import math

import numpy as np
from scipy import stats


def interval(values: list[float], level: float = 0.95) -> dict:
    """
    Mean with its interval by Student's t; no interval from one value.

    ```python
    >>> from trl_mprm.demo.inference import interval
    >>> {name: round(value, 2) for name, value in interval([1.0, 2.0, 3.0]).items()}
    {'mean': 2.0, 'low': -0.48, 'high': 4.48, 'sd': 1.0, 'seeds': 3}

    ```
    """
    mean, n = float(np.mean(values)), len(values)
    if n == 1:
        return {"mean": mean, "low": None, "high": None, "sd": None, "seeds": 1}
    sd = float(np.std(values, ddof=1))
    half = float(stats.t.ppf(0.5 + level / 2, n - 1)) * sd / math.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half, "sd": sd, "seeds": n}


def p_above(differences: list[float], bound: float = 0.0) -> float:
    """
    One-sided p-value of a paired t-test: the mean difference is at most `bound`, against: it is above.

    ```python
    >>> from trl_mprm.demo.inference import p_above
    >>> round(p_above([1.0, 2.0, 3.0]), 3), round(p_above([1.0, 2.0, 3.0], bound=2.0), 3)
    (0.037, 0.5)

    ```
    """
    if len(differences) < 2:
        return math.nan
    return float(stats.ttest_1samp(differences, bound, alternative="greater").pvalue)


def p_equivalent(differences: list[float], margin: float) -> float:
    """
    Two one-sided tests (TOST): the mean difference lies outside -margin to +margin, against: it lies inside.

    ```python
    >>> from trl_mprm.demo.inference import p_equivalent
    >>> round(p_equivalent([-0.5, 0.2, 0.4, 0.1], margin=2.0), 4), round(p_equivalent([1.5, 2.2, 1.4], 2.0), 2)
    (0.001, 0.18)

    ```
    """
    return max(p_above(differences, -margin), p_above([-value for value in differences], -margin))


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """
    Holm's adjusted p-values: each may be compared with 0.05, and the chance of any false one stays below it.

    ```python
    >>> from trl_mprm.demo.inference import holm
    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'b': 0.06, 'c': 0.06}

    ```
    """
    adjusted, highest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}
