"""
Turn checked step labels and scores into arrays of counts, and compute measures from these.

Steps are counted by question, source, label and prediction, so that a bootstrap over questions only weights the counts
of each question and never returns to the steps.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


FOLDS = 5

CALIBRATION_BINS = 15


class Steps:
    """Checked solutions as flat arrays without neutral steps; names of sources and questions are coded."""

    def __init__(self, labels, scores, sources, groups):
        self.n_solutions = len(labels)
        sources = ["all"] * self.n_solutions if sources is None else sources
        groups = range(self.n_solutions) if groups is None else groups
        for name, values in (("scores", scores), ("sources", sources), ("groups", groups)):
            if len(values) != self.n_solutions:
                raise ValueError(f"labels have {self.n_solutions} solutions, {name} {len(values)}: expected as many")
        self.lists = labels, scores, sources, groups
        label, score, solution = _flatten(labels, scores)
        self.source_names, self.source_of = np.unique([str(source) for source in sources], return_inverse=True)
        group_names, self.group_of = np.unique([str(group) for group in groups], return_inverse=True)
        self.n_groups = len(group_names)
        kept = label != 0
        self.neutral = np.bincount(self.source_of[solution[~kept]], minlength=len(self.source_names))
        self.correct, self.score, self.solution = label[kept] == 1, score[kept], solution[kept]
        self.source, self.group = self.source_of[self.solution], self.group_of[self.solution]

    def of_source(self, code: int) -> "Steps":
        if len(self.source_names) == 1:
            return self
        members = np.flatnonzero(self.source_of == code)
        return Steps(*([values[index] for index in members] for values in self.lists))

    def predict(self, threshold: float | str) -> tuple[np.ndarray, float | list[float], str]:
        """Return which steps are predicted correct, shape `(steps,)`; the threshold, or one per fold; the protocol."""
        if threshold == "held_out":
            fold_of = _folds(self.group_of, self.source_of)
            fold = fold_of[self.group]
            parts = [fold != k for k in range(fold_of.max() + 1)]
            threshold = [best_threshold(self.correct[part], self.score[part], self.source[part]) for part in parts]
            return self.score >= np.array(threshold)[fold], threshold, "held_out"
        if threshold == "oracle":
            threshold = best_threshold(self.correct, self.score, self.source)
            return self.score >= threshold, threshold, "oracle"
        if isinstance(threshold, int | float) and 0 <= threshold <= 1:
            return self.score >= threshold, float(threshold), "fixed"
        raise ValueError(f'threshold must be "held_out", "oracle" or a number in [0, 1], got {threshold!r}')

    def counts(self, predicted: np.ndarray) -> np.ndarray:
        """Steps by group, source, labelled correct, predicted correct."""
        counts = np.zeros((self.n_groups, len(self.source_names), 2, 2))
        np.add.at(counts, (self.group, self.source, self.correct * 1, predicted * 1), 1)
        return counts

    def overall(self, predicted: np.ndarray) -> Callable[[np.ndarray], dict[str, float]]:
        """Return the measures as a function of `weight`, where question g counts `weight[g]` times."""
        counts = self.counts(predicted)
        # Counts of solutions, and of those with the first error found, by group, source, and presence of an error.
        solved = np.zeros((self.n_groups, len(self.source_names), 2, 2))
        truth, found = (_first(~each, self.solution, self.n_solutions) for each in (self.correct, predicted))
        measured = np.unique(self.solution)
        cell = (self.group_of[measured], self.source_of[measured], (truth[measured] < len(predicted)) * 1)
        np.add.at(solved, (*cell, 0), 1)
        np.add.at(solved, (*cell, 1), (truth == found)[measured])
        # Number of steps, sum of scores and sum of labels, by group and bin.
        bins = np.zeros((self.n_groups, CALIBRATION_BINS, 3))
        columns = (np.ones(len(self.score)), self.score, self.correct)
        np.add.at(bins, (self.group, _bin(self.score)), np.stack(columns, axis=-1))
        squares = np.bincount(self.group, (self.score - self.correct) ** 2, minlength=self.n_groups)
        _, rank = np.unique(self.score, return_inverse=True)
        n_ranks = rank.max(initial=0) + 1

        def measure(weight: np.ndarray) -> dict[str, float]:
            total = np.tensordot(weight, counts, axes=1)
            macro_f1 = class_f1(total).mean(-1)
            n_steps = total.sum()
            # Counts of correct and incorrect steps at each distinct score, lowest first.
            step_weight = weight[self.group]
            good = np.bincount(rank, step_weight * self.correct, minlength=n_ranks)
            bad = np.bincount(rank, step_weight * ~self.correct, minlength=n_ranks)
            number, score_sum, label_sum = np.tensordot(weight, bins, axes=1).T
            by_source = np.tensordot(weight, solved, axes=1)
            accuracy = _ratio(by_source.sum(0)[:, 1], by_source.sum(0)[:, 0])
            return {
                "macro_f1_step_weighted": step_weighted_mean(macro_f1, total.sum((-1, -2))),
                "macro_f1_pooled": class_f1(total.sum(0)).mean(-1),
                "macro_f1_source_mean": step_weighted_mean(macro_f1, np.ones(len(macro_f1))),
                "auc": _ratio((good * (np.cumsum(bad) - bad / 2)).sum(), good.sum() * bad.sum()),
                "average_precision_correct": _average_precision(good[::-1], bad[::-1]),
                "average_precision_incorrect": _average_precision(bad, good),
                "brier": _ratio(weight @ squares, n_steps),
                "calibration_error": _ratio(np.abs(score_sum - label_sum).sum(), n_steps),
                "first_error_accuracy": _ratio(*by_source.sum((0, 1))[::-1]),
                "first_error_accuracy_erroneous": accuracy[1],
                "first_error_accuracy_correct": accuracy[0],
                "processbench_f1": _harmonic_mean(*accuracy),
                "processbench_f1_source_mean": step_weighted_mean(
                    _harmonic_mean(*_ratio(by_source[..., 1], by_source[..., 0]).T), np.ones(len(by_source))
                ),
            }

        return measure


def class_f1(counts: np.ndarray) -> np.ndarray:
    """
    F1 of the incorrect and of the correct class, `2 TP / (labelled + predicted)`, shape `(..., 2)`.

    `counts` holds steps by label and prediction, shape `(..., 2, 2)`, index 1 for correct. The F1 of a class without
    labelled steps is NaN.
    """
    hits = counts[..., (0, 1), (0, 1)]
    labelled, predicted = counts.sum(-1), counts.sum(-2)
    return np.divide(2.0 * hits, labelled + predicted, out=np.full(hits.shape, np.nan), where=labelled > 0)


def step_weighted_mean(values: np.ndarray, n_steps: np.ndarray) -> np.ndarray:
    """
    Mean over the last axis weighted by `n_steps`, ignoring NaN values; NaN if nothing is left.

    Examples:
    ```python
    >>> from trl_mprm.evaluation.step_counts import step_weighted_mean
    >>> # Per-source macro-F1 of BIS-10% with InternVL2.5-8B (Table 2) and the labelled steps of VisualProcessBench
    >>> float(step_weighted_mean([66.90, 65.07, 63.35, 65.56, 65.10], [6225, 8727, 2406, 4560, 2358]).round(2))
    65.46

    ```
    """
    values = np.asarray(values, dtype=np.float64)
    weights = np.where(np.isnan(values), 0.0, n_steps)
    total, sums = weights.sum(-1), (np.nan_to_num(values) * weights).sum(-1)
    return np.divide(sums, total, out=np.full(total.shape, np.nan), where=total > 0)


def best_threshold(correct: np.ndarray, scores: np.ndarray, sources: np.ndarray | None = None) -> float:
    """
    Find the threshold in [0, 1] with the highest `macro_f1_step_weighted`, exactly: one sort, one pass per source.

    Candidates are 0, 0.5 and the middle of each gap between neighbouring distinct scores (0 and 1 included), which covers
    every split that a threshold can make. Among equally good ones the nearest to 0.5 wins, then the lower.

    `correct` (True for a step labelled correct), `scores` and `sources` (default: one source) have shape `(steps,)`.

    Examples:
    ```python
    >>> from trl_mprm.evaluation.step_counts import best_threshold
    >>> best_threshold([True, True, False, False], [0.9, 0.8, 0.6, 0.1])
    0.7

    ```
    """
    correct, scores = np.asarray(correct, dtype=bool), np.asarray(scores, dtype=np.float64)
    sources = np.zeros(len(scores)) if sources is None else np.asarray(sources)
    order = np.argsort(scores)
    correct, scores, sources = correct[order], scores[order], sources[order]
    edges = np.unique(np.concatenate(([0.0], scores, [1.0])))
    middles = (edges[:-1] + edges[1:]) / 2
    # The middle of neighbouring floats rounds to one of them. It must not be the lower, which the threshold would include.
    candidates = np.concatenate(([0.0, 0.5], np.where(middles > edges[:-1], middles, edges[1:])))
    below = np.searchsorted(scores, candidates)
    value, n_steps = np.zeros(len(candidates)), 0
    for source in np.unique(sources):
        here = sources == source
        # For this source and each candidate: correct steps below it (missed), incorrect steps below it (caught).
        good, bad = (np.concatenate(([0], np.cumsum(here & each))) for each in (correct, ~correct))
        missed, caught, n_good, n_bad = good[below], bad[below], good[-1], bad[-1]
        if n_good and n_bad:
            f1_good = 2 * (n_good - missed) / (2 * n_good - missed + n_bad - caught)
            f1_bad = 2 * caught / (n_bad + missed + caught)
            value += (n_good + n_bad) * (f1_good + f1_bad) / 2
            n_steps += n_good + n_bad
    # Rounded, so that equal counts summed in another order still tie. If nothing is defined, all tie and 0.5 wins.
    value = (value / max(n_steps, 1)).round(12)
    best = candidates[value == value.max()]
    return float(best[np.lexsort((best, np.abs(best - 0.5)))[0]])


def calibration_bins(labels: Sequence[Sequence[int]], scores: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """
    Compare scores with the share of correct steps, in 15 bins of equal width; neutral steps are left out.

    Returns:
        `list[dict]`: for each bin `low` (exclusive, except 0), `high` (inclusive), `n_steps` and, if it has steps,
        `mean_score` and `share_correct`. `calibration_error` of [`step_metrics`] is the mean distance between these
        two, weighted by `n_steps`.

    Examples:
    ```python
    >>> from trl_mprm.evaluation.step_counts import calibration_bins
    >>> [bin for bin in calibration_bins([[1, -1, 0]], [[0.97, 0.99, 0.5]]) if bin["n_steps"]]
    [{'low': 0.9333, 'high': 1.0, 'n_steps': 2, 'mean_score': 0.98, 'share_correct': 0.5}]

    ```
    """
    label, score, _ = _flatten(labels, scores)
    label, score = label[label != 0], score[label != 0]
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    rows = []
    for number in range(CALIBRATION_BINS):
        inside = _bin(score) == number
        row = {"low": round(edges[number], 4), "high": round(edges[number + 1], 4), "n_steps": int(inside.sum())}
        if inside.any():
            row |= {"mean_score": float(score[inside].mean()), "share_correct": float((label[inside] == 1).mean())}
        rows.append({key: value.item() if isinstance(value, np.floating) else value for key, value in row.items()})
    return rows


def check_scores(name: str, scores: Sequence[float]) -> None:
    bad = [value for value in np.asarray(scores).tolist() if not (isinstance(value, float | int) and 0 <= value <= 1)]
    if bad:
        raise ValueError(f"{name}: scores must be numbers in [0, 1], got {bad[0]!r}")


def _ratio(numerator: np.ndarray | float, denominator: np.ndarray | float) -> np.ndarray:
    """`numerator / denominator`, or NaN where the denominator is 0."""
    numerator, denominator = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    return np.divide(numerator, denominator, out=np.full(denominator.shape, np.nan), where=denominator > 0)


def _harmonic_mean(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """`2ab / (a + b)`, or 0 for two zeros, or NaN where either is NaN."""
    return np.where(one + other == 0, 0.0, _ratio(2 * one * other, one + other))


def _average_precision(found: np.ndarray, others: np.ndarray) -> float:
    """Sum of precision times the gain in recall over descending distinct scores, given the steps at each."""
    if found.sum() == 0 or others.sum() == 0:
        return np.nan
    precision = _ratio(np.cumsum(found), np.cumsum(found + others))
    return float((found * np.nan_to_num(precision)).sum() / found.sum())


def _bin(scores: np.ndarray) -> np.ndarray:
    """Number of the calibration bin of each score; an edge belongs to the bin below it."""
    return np.searchsorted(np.linspace(0, 1, CALIBRATION_BINS + 1)[1:-1], scores)


def _folds(group_of: np.ndarray, source_of: np.ndarray) -> np.ndarray:
    """Fold of each question. Folds are dealt source by source in the order of names, whatever the input order."""
    n_groups = group_of.max() + 1
    if n_groups < 2:
        raise ValueError('threshold="held_out" needs at least 2 questions, got 1: pass a number instead')
    source_of_group = np.full(n_groups, source_of.max())
    np.minimum.at(source_of_group, group_of, source_of)
    folds = np.empty(n_groups, dtype=int)
    folds[np.argsort(source_of_group, kind="stable")] = np.arange(n_groups) % FOLDS
    return folds


def _first(wrong: np.ndarray, solution: np.ndarray, n_solutions: int) -> np.ndarray:
    """Position of the first wrong step of each solution, or `len(wrong)` if it has none."""
    first = np.full(n_solutions, len(wrong))
    np.minimum.at(first, solution[wrong], np.flatnonzero(wrong))
    return first


def _flatten(labels, scores) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Check every solution; return the label, score and solution of each step, shape `(steps,)`."""
    if len(labels) == 0:
        raise ValueError("expected at least one solution, got none")
    for index, pair in enumerate(zip(labels, scores, strict=True)):
        label, score = map(np.asarray, pair)
        if label.shape != score.shape or label.ndim != 1:
            raise ValueError(f"solution {index}: {label.size} labels, {score.size} scores: expected as many")
        # A bool is refused because False equals 0, which means neutral here.
        if label.dtype == bool or not np.isin(label, (1, 0, -1)).all():
            got = sorted(set(label.tolist()), key=str)
            raise ValueError(f"solution {index}: labels must be 1 (correct), 0 (neutral), -1 (incorrect), got {got}")
        check_scores(f"solution {index}", score)
    flat = np.concatenate([np.asarray(values, dtype=np.float64) for values in (*labels, *scores)])
    return *np.split(flat, 2), np.repeat(np.arange(len(labels)), [len(label) for label in labels])
