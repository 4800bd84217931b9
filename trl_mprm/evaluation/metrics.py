"""
How well step scores tell correct steps from incorrect ones. Pure numpy.

One solution in, with labels 1 (correct), 0 (neutral, ignored), -1 (incorrect) and P(step good) as scores:

    labels [1, 1, 0, -1]   scores [0.9, 0.8, 0.5, 0.1]   threshold 0.5 -> predicted [correct, correct, -, incorrect]

Macro-F1 is the mean of the F1 of the correct and of the incorrect class. Three numbers are called "overall":

    macro_f1_step_weighted   mean over sources of macro-F1, weighted by steps (the paper prints it as micro-F1)
    macro_f1_pooled          macro-F1 of all steps together (VisualPRM prints it)
    macro_f1_source_mean     mean over sources of macro-F1, unweighted
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..data.aggregates import AGGREGATES


FOLDS = 5

CALIBRATION_BINS = 15

# PRMBench's nine kinds of error, under the names of its file, by the three dimensions of its paper.
PRMBENCH_DIMENSIONS = {
    "simplicity": ("redundency", "circular"),
    "soundness": ("counterfactual", "step_contradiction", "domain_inconsistency", "confidence"),
    "sensitivity": ("missing_condition", "deception", "multi_solutions"),
}


def step_metrics(
    labels: Sequence[Sequence[int]],
    scores: Sequence[Sequence[float]],
    sources: Sequence[str] | None = None,
    groups: Sequence[str | int] | None = None,
    threshold: float | str = "held_out",
    n_resamples: int = 1000,
    seed: int = 0,
) -> dict:
    """
    Measure step scores against step labels. A step is predicted correct if its score is at least the threshold.

    Args:
        labels (`Sequence[Sequence[int]]`):
            One list per solution, one label per step: 1 correct, 0 neutral (ignored everywhere), -1 incorrect.
        scores (`Sequence[Sequence[float]]`):
            Same shape, P(step good) in [0, 1].
        sources (`Sequence[str]`, *optional*):
            Source of each solution. Default: one source, `"all"`.
        groups (`Sequence[str | int]`, *optional*):
            Question of each solution; folds and bootstrap keep a question together. Default: each its own.
        threshold (`float` or `str`, *optional*, defaults to `"held_out"`):
            A number in [0, 1]: `fixed`. `"held_out"`: questions are dealt into 5 folds (or as many as there are),
            each uses the [`best_threshold`] of the others. `"oracle"`: the best threshold on the very steps that are
            measured, as in the paper's code; it flatters the model.
        n_resamples (`int`, *optional*, defaults to `1000`):
            Bootstrap resamples of questions, drawn with `seed`. 0 skips the intervals.

    Returns:
        `dict`, ready for JSON:
        - the three `macro_f1_*`;
        - of all steps together, whatever the threshold: `auc`; `average_precision_correct` and
          `average_precision_incorrect`, with that class as the one to find; `brier`, the mean squared distance between
          score and label; `calibration_error` (ECE), the mean distance between score and share of correct steps over
          15 bins of equal width, weighted by steps, see [`calibration_bins`];
        - `first_error_accuracy`: share of solutions whose first step predicted incorrect is the first step labelled
          incorrect, or that have neither. Neutral steps are skipped; solutions with no other step are left out.
          `first_error_accuracy_erroneous` and `_correct`: the same of the solutions with and without an error.
          `processbench_f1`: harmonic mean of these two, the score of ProcessBench (arXiv 2412.06559), and
          `processbench_f1_source_mean`, which it prints as average;
        - `threshold` (one number, or one per fold) and `threshold_protocol` (`fixed`, `held_out` or `oracle`);
        - `n_solutions`, `n_steps` (= `n_correct` + `n_incorrect`), `n_correct`, `n_incorrect`, `n_neutral`;
        - `intervals`: `[low, high]` of all these measures, 95% percentile bootstrap over questions. Predictions stay as
          they are, so the spread leaves out the choice of the threshold;
        - `sources`: per source `macro_f1`, `f1_correct`, `f1_incorrect`, the other measures, and counts.

        What is undefined is `None`, never NaN: F1 of a class that labels no step, macro-F1, AUC and average precision
        where a class is absent, intervals of fewer than two questions. Means over sources leave undefined sources out.

    Raises:
        `ValueError`: unequal lengths, a label or score out of range (the solution is named), an unknown threshold,
        `"held_out"` with fewer than two questions.

    Examples:
    ```python
    >>> from trl_mprm.evaluation.metrics import step_metrics
    >>> metrics = step_metrics([[1, 1, 0, -1], [1, -1]], [[0.9, 0.8, 0.5, 0.1], [0.7, 0.6]], threshold=0.5)
    >>> round(metrics["macro_f1_pooled"], 4)  # correct: 2*3/(2*3+1) = 6/7; incorrect: 2*1/(2*1+1) = 2/3
    0.7619
    >>> metrics["auc"], metrics["first_error_accuracy"], metrics["n_steps"]
    (1.0, 0.5, 5)

    ```
    """
    steps = _Steps(labels, scores, sources, groups)
    predicted, threshold, protocol = steps.predict(threshold)
    overall = steps.overall(predicted)
    totals = steps.counts(predicted).sum(0)
    per_source = {}
    for code, name in enumerate(steps.source_names):
        f1_incorrect, f1_correct = class_f1(totals[code])
        own = steps.of_source(code)
        measures = own.overall(predicted[steps.source == code])(np.ones(own.n_groups))
        per_source[str(name)] = {
            "macro_f1": _or_none((f1_incorrect + f1_correct) / 2),
            "f1_correct": _or_none(f1_correct),
            "f1_incorrect": _or_none(f1_incorrect),
            **{name: _or_none(value) for name, value in measures.items() if name not in _OF_ALL_SOURCES},
            "n_solutions": own.n_solutions,
            **_step_counts(totals[code], steps.neutral[code]),
        }
    samples = _resample(overall, steps.n_groups, n_resamples, seed)
    return {
        **{name: _or_none(value) for name, value in overall(np.ones(steps.n_groups)).items()},
        "threshold": threshold,
        "threshold_protocol": protocol,
        "n_solutions": steps.n_solutions,
        **_step_counts(totals.sum(0), steps.neutral.sum()),
        "intervals": {name: _interval(values, steps.n_groups) for name, values in samples.items()},
        "sources": per_source,
    }


def paired_bootstrap(
    labels: Sequence[Sequence[int]],
    first: Sequence[Sequence[float]],
    second: Sequence[Sequence[float]],
    sources: Sequence[str] | None = None,
    groups: Sequence[str | int] | None = None,
    threshold: float | str = "held_out",
    n_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, dict]:
    """
    Test whether two models differ on the same steps: paired bootstrap over questions.

    Both models are measured on the very same resampled questions, so what makes a question hard for both cancels.

    Args:
        labels, sources, groups, threshold, n_resamples, seed:
            As in [`step_metrics`]; the threshold protocol is applied to each model alone.
        first, second (`Sequence[Sequence[float]]`):
            Scores of the two models.

    Returns:
        `dict`: for each measure of [`step_metrics`] that is defined, `first`, `second`, `difference` (first minus
        second), its 95% `interval`, and `p_value`, two-sided: twice the share of resamples on the rarer side of zero,
        both counts plus one. It is 1 for equal models, and never below `2 / (n_resamples + 1)`.

    Examples:
    ```python
    >>> from trl_mprm.evaluation.metrics import paired_bootstrap
    >>> labels = [[1, -1]] * 20
    >>> test = paired_bootstrap(labels, [[0.9, 0.1]] * 20, [[0.9, 0.8]] * 20, threshold=0.5)["brier"]
    >>> round(test["difference"], 3), round(test["p_value"], 3)
    (-0.315, 0.002)

    ```
    """
    measures = []
    for scores in (first, second):
        steps = _Steps(labels, scores, sources, groups)
        measures.append(steps.overall(steps.predict(threshold)[0]))

    def difference(weight: np.ndarray) -> dict[str, float]:
        one, other = (measure(weight) for measure in measures)
        return {name: one[name] - other[name] for name in one}

    one, other = (measure(np.ones(steps.n_groups)) for measure in measures)
    tests = {}
    for name, values in _resample(difference, steps.n_groups, n_resamples, seed).items():
        if not np.isnan(one[name] - other[name]):
            values = values[~np.isnan(values)]
            rarer = min((values <= 0).sum(), (values >= 0).sum())
            tests[name] = {
                "first": float(one[name]),
                "second": float(other[name]),
                "difference": float(one[name] - other[name]),
                "interval": _interval(values, steps.n_groups),
                "p_value": float(min(1.0, 2 * (rarer + 1) / (len(values) + 1))),
            }
    return tests


def best_of_n_metrics(
    correct: Sequence[bool],
    scores: Sequence[Sequence[float]],
    groups: Sequence[str | int],
    sources: Sequence[str] | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
) -> dict:
    """
    Measure best-of-N: how often the candidate that the scores rank first has the correct answer.

    Where candidates of a question tie for the first place, the mean of their correctness counts, so that the order of
    candidates decides nothing.

    Args:
        correct (`Sequence[bool]`):
            Whether the answer of each candidate is correct.
        scores (`Sequence[Sequence[float]]`):
            P(step good) of the steps of each candidate.
        groups (`Sequence[str | int]`):
            Question of each candidate.
        sources (`Sequence[str]`, *optional*):
            Source of each candidate. Default: one source, `"all"`.
        n_resamples, seed:
            As in [`step_metrics`].

    Returns:
        `dict`: `accuracy_mean`, `accuracy_min`, `accuracy_product`, `accuracy_last`, one for each of `AGGREGATES`;
        `pass_at_1`, the share of correct candidates, which blind choice would reach; `pass_at_n`, the share of
        questions with a correct candidate, which no choice can beat; their `intervals`; `n_questions`, `n_candidates`
        (fewest and most of a question); and the same by source.

    Examples:
    ```python
    >>> from trl_mprm.evaluation.metrics import best_of_n_metrics
    >>> metrics = best_of_n_metrics([True, False, False], [[0.9, 0.4], [0.6, 0.6], [0.1]], ["q", "q", "q"])
    >>> metrics["accuracy_mean"], metrics["accuracy_min"], round(metrics["pass_at_1"], 2)  # 0.65 > 0.6; 0.4 < 0.6
    (1.0, 0.0, 0.33)

    ```
    """
    sources = ["all"] * len(correct) if sources is None else sources
    for name, values in (("scores", scores), ("groups", groups), ("sources", sources)):
        if len(values) != len(correct):
            raise ValueError(f"correct has {len(correct)} candidates, {name} {len(values)}: expected as many")
    if not len(correct):
        raise ValueError("expected at least one candidate, got none")
    for index, steps in enumerate(scores):
        if not len(steps):
            raise ValueError(f"candidate {index} has no scores, expected one a step: leave its question out")
        _check_scores(f"candidate {index}", steps)
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(str(group), []).append(index)
    questions = sorted(members)
    source_of = np.array([str(sources[members[question][0]]) for question in questions])
    sizes = np.array([len(members[question]) for question in questions])
    right = np.asarray(correct, dtype=np.float64)
    table = np.empty((len(questions), len(AGGREGATES) + 2))
    ranks = {name: np.array([aggregate(steps) for steps in scores]) for name, aggregate in AGGREGATES.items()}
    for row, question in zip(table, questions, strict=True):
        own = members[question]
        row[:-2] = [right[own][rank[own] == rank[own].max()].mean() for rank in ranks.values()]
        row[-2:] = right[own].mean(), right[own].max()
    names = [*(f"accuracy_{name}" for name in AGGREGATES), "pass_at_1", "pass_at_n"]

    def measured(rows: np.ndarray, sizes: np.ndarray) -> dict:
        samples = _resample(
            lambda weight: dict(zip(names, weight @ rows / weight.sum(), strict=True)), len(rows), n_resamples, seed
        )
        return {
            **dict(zip(names, rows.mean(0).tolist(), strict=True)),
            "intervals": {name: _interval(values, len(rows)) for name, values in samples.items()},
            "n_questions": len(rows),
            "n_candidates": [int(sizes.min()), int(sizes.max())],
        }

    of = {str(name): source_of == name for name in np.unique(source_of)}
    return measured(table, sizes) | {"sources": {name: measured(table[own], sizes[own]) for name, own in of.items()}}


def prmbench_scores(metrics: dict) -> dict[str, float | None]:
    """
    Read PRMBench's scores (arXiv 2501.03124) off [`step_metrics`] whose sources are its kinds of error.

    PRMScore is half the F1 of correct steps plus half the F1 of incorrect steps, of all steps together (`overall`) and
    of each kind. `multi_solutions` has no incorrect step; its column is the F1 of correct steps. A dimension is the
    mean of its kinds.

    Examples:
    ```python
    >>> from trl_mprm.evaluation.metrics import prmbench_scores, step_metrics
    >>> metrics = step_metrics([[1, -1], [1]], [[0.9, 0.2], [0.9]], ["circular", "multi_solutions"], threshold=0.5)
    >>> scores = prmbench_scores(metrics)
    >>> scores["overall"], scores["circular"], scores["multi_solutions"], scores["simplicity"]
    (1.0, 1.0, 1.0, None)

    ```
    """
    kinds = {
        name: source["f1_correct" if name == "multi_solutions" else "macro_f1"]
        for name, source in metrics["sources"].items()
    }
    scores = {"overall": metrics["macro_f1_pooled"]}
    for dimension, names in PRMBENCH_DIMENSIONS.items():
        values = [kinds.get(name) for name in names]
        scores[dimension] = None if None in values else float(np.mean(values))
    return scores | kinds


def class_f1(counts: np.ndarray) -> np.ndarray:
    """
    F1 of the incorrect and of the correct class, `2 TP / (labelled + predicted)`, shape `(..., 2)`.

    `counts` is steps by label and prediction, shape `(..., 2, 2)`, index 1 for correct. The F1 of a class that labels
    no step is NaN.
    """
    hits = counts[..., (0, 1), (0, 1)]
    labelled, predicted = counts.sum(-1), counts.sum(-2)
    return np.divide(2.0 * hits, labelled + predicted, out=np.full(hits.shape, np.nan), where=labelled > 0)


def step_weighted_mean(values: np.ndarray, n_steps: np.ndarray) -> np.ndarray:
    """
    Mean of the last axis weighted by `n_steps`; NaN values are left out, nothing left gives NaN.

    Examples:
    ```python
    >>> from trl_mprm.evaluation.metrics import step_weighted_mean
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
    Find the threshold in [0, 1] with the highest `macro_f1_step_weighted`, exactly: one sort, one pass a source.

    Candidates are 0, 0.5 and the middle of each gap between neighbouring distinct scores (0 and 1 included), which is
    every split that a threshold can make. Of equally good ones the nearest to 0.5 wins, then the lower.

    `correct` (True for a step labelled correct), `scores` and `sources` (default: one source) have shape `(steps,)`.

    Examples:
    ```python
    >>> from trl_mprm.evaluation.metrics import best_threshold
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
    # Between neighbouring floats the middle rounds to one of them; it must not be the lower, which would count too.
    candidates = np.concatenate(([0.0, 0.5], np.where(middles > edges[:-1], middles, edges[1:])))
    below = np.searchsorted(scores, candidates)
    value, n_steps = np.zeros(len(candidates)), 0
    for source in np.unique(sources):
        here = sources == source
        # Of this source below each candidate: correct steps that are missed, incorrect steps that are caught.
        good, bad = (np.concatenate(([0], np.cumsum(here & each))) for each in (correct, ~correct))
        missed, caught, n_good, n_bad = good[below], bad[below], good[-1], bad[-1]
        if n_good and n_bad:
            f1_good = 2 * (n_good - missed) / (2 * n_good - missed + n_bad - caught)
            f1_bad = 2 * caught / (n_bad + missed + caught)
            value += (n_good + n_bad) * (f1_good + f1_bad) / 2
            n_steps += n_good + n_bad
    # Rounded, so that equal counts added up in another order still tie. Nothing defined ties too: 0.5.
    value = (value / max(n_steps, 1)).round(12)
    best = candidates[value == value.max()]
    return float(best[np.lexsort((best, np.abs(best - 0.5)))[0]])


def calibration_bins(labels: Sequence[Sequence[int]], scores: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """
    Compare scores with the share of correct steps, in 15 bins of equal width; neutral steps are left out.

    Returns:
        `list[dict]`: per bin `low` (exclusive, but for 0), `high` (inclusive), `n_steps`, and where it has steps
        `mean_score` and `share_correct`. `calibration_error` of [`step_metrics`] is the mean distance of these two,
        weighted by `n_steps`.

    Examples:
    ```python
    >>> from trl_mprm.evaluation.metrics import calibration_bins
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


# Of all sources together only: for one source they would be its `macro_f1` and `processbench_f1` again.
_OF_ALL_SOURCES = (
    "macro_f1_step_weighted",
    "macro_f1_pooled",
    "macro_f1_source_mean",
    "processbench_f1_source_mean",
)


class _Steps:
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

    def of_source(self, code: int) -> "_Steps":
        if len(self.source_names) == 1:
            return self
        members = np.flatnonzero(self.source_of == code)
        return _Steps(*([values[index] for index in members] for values in self.lists))

    def predict(self, threshold: float | str) -> tuple[np.ndarray, float | list[float], str]:
        """Which steps are predicted correct, shape `(steps,)`; the threshold, or one per fold; its protocol."""
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
        # Solutions by group, source, with an error or without; their number, and how many of them hit the first error.
        solved = np.zeros((self.n_groups, len(self.source_names), 2, 2))
        truth, found = (_first(~each, self.solution, self.n_solutions) for each in (self.correct, predicted))
        measured = np.unique(self.solution)
        cell = (self.group_of[measured], self.source_of[measured], (truth[measured] < len(predicted)) * 1)
        np.add.at(solved, (*cell, 0), 1)
        np.add.at(solved, (*cell, 1), (truth == found)[measured])
        # Steps by group and bin; their number, and the sums of scores and of labels.
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
            # Correct and incorrect steps at each distinct score, lowest first.
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


def _ratio(numerator: np.ndarray | float, denominator: np.ndarray | float) -> np.ndarray:
    """`numerator / denominator`, NaN where the denominator is 0."""
    numerator, denominator = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    return np.divide(numerator, denominator, out=np.full(denominator.shape, np.nan), where=denominator > 0)


def _harmonic_mean(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """`2ab / (a + b)`, 0 for two zeros, NaN where either is."""
    return np.where(one + other == 0, 0.0, _ratio(2 * one * other, one + other))


def _average_precision(found: np.ndarray, others: np.ndarray) -> float:
    """Sum of precision times the gain in recall, going down the distinct scores; steps at each of them are given."""
    if found.sum() == 0 or others.sum() == 0:
        return np.nan
    precision = _ratio(np.cumsum(found), np.cumsum(found + others))
    return float((found * np.nan_to_num(precision)).sum() / found.sum())


def _bin(scores: np.ndarray) -> np.ndarray:
    """Number of the calibration bin of each score; an edge belongs to the bin below it."""
    return np.searchsorted(np.linspace(0, 1, CALIBRATION_BINS + 1)[1:-1], scores)


def _folds(group_of: np.ndarray, source_of: np.ndarray) -> np.ndarray:
    """Fold of each question: dealt out source by source in the order of names, whatever the order of the input."""
    n_groups = group_of.max() + 1
    if n_groups < 2:
        raise ValueError('threshold="held_out" needs at least 2 questions, got 1: pass a number instead')
    source_of_group = np.full(n_groups, source_of.max())
    np.minimum.at(source_of_group, group_of, source_of)
    folds = np.empty(n_groups, dtype=int)
    folds[np.argsort(source_of_group, kind="stable")] = np.arange(n_groups) % FOLDS
    return folds


def _resample(overall: Callable, n_groups: int, n_resamples: int, seed: int) -> dict[str, np.ndarray]:
    """Values of the measures of `overall(weight)`, one per resample of the questions."""
    generator = np.random.default_rng(seed)
    draws = (generator.integers(0, n_groups, n_groups) for _ in range(n_resamples))
    samples = [overall(np.bincount(drawn, minlength=n_groups).astype(float)) for drawn in draws]
    return {name: np.array([sample[name] for sample in samples]) for name in (samples[0] if samples else ())}


def _interval(values: np.ndarray, n_groups: int) -> list[float] | None:
    """95% percentile interval; undefined resamples are left out."""
    values = values[~np.isnan(values)]
    return np.quantile(values, (0.025, 0.975)).tolist() if n_groups > 1 and len(values) else None


def _first(wrong: np.ndarray, solution: np.ndarray, n_solutions: int) -> np.ndarray:
    """Position of the first wrong step of each solution; `len(wrong)` for none."""
    first = np.full(n_solutions, len(wrong))
    np.minimum.at(first, solution[wrong], np.flatnonzero(wrong))
    return first


def _flatten(labels, scores) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Check every solution; return labels, scores and the solution of each step, shape `(steps,)`."""
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
        _check_scores(f"solution {index}", score)
    flat = np.concatenate([np.asarray(values, dtype=np.float64) for values in (*labels, *scores)])
    return *np.split(flat, 2), np.repeat(np.arange(len(labels)), [len(label) for label in labels])


def _check_scores(name: str, scores: Sequence[float]) -> None:
    bad = [value for value in np.asarray(scores).tolist() if not (isinstance(value, float | int) and 0 <= value <= 1)]
    if bad:
        raise ValueError(f"{name}: scores must be numbers in [0, 1], got {bad[0]!r}")


def _step_counts(counts: np.ndarray, neutral: int) -> dict[str, int]:
    incorrect, correct = (int(count) for count in counts.sum(-1))
    return {"n_steps": correct + incorrect, "n_correct": correct, "n_incorrect": incorrect, "n_neutral": int(neutral)}


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
