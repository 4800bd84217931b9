"""The rules of a selection."""

from numbers import Integral

import numpy as np

from .bis import score_of_sums


RULES = ("bis", "random", "mixed", "reliable", "low_mc")


def score_of_kinds(rule: str, alpha: float | None, kinds: np.ndarray, score: np.ndarray | None) -> np.ndarray:
    if score is not None:
        return score
    n_steps, n_pos, mc_sum = kinds["n_steps"].astype(np.int64), kinds["n_pos"].astype(np.int64), kinds["mc_sum"]
    if rule == "bis":
        return score_of_sums(n_steps, n_pos, mc_sum, alpha)["bis"]
    return {
        "random": np.zeros(len(kinds)),
        "mixed": ((n_pos > 0) & (n_pos < n_steps)).astype(float),
        "reliable": np.where(n_pos > 0, mc_sum / np.maximum(n_pos, 1), 1.0),
        "low_mc": 0.0 - mc_sum / np.maximum(n_steps, 1),
    }[rule]


def check_cut(fraction: float, ties: str, rule: str = "bis", alpha: float = 0.05, seed: int = 0) -> None:
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1 (0.1 keeps a tenth), got {fraction!r}")
    if ties not in ("first", "hash"):
        raise ValueError(f'ties must be "first" (file order) or "hash" (seeded, any order), got {ties!r}')
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha must be a number of at least 0 (the paper uses 0.05 and 0.2), got {alpha!r}")
    if not isinstance(seed, Integral) or seed < 0:
        raise ValueError(f"seed must be a whole number of at least 0, got {seed!r}")
