"""
Measure how well step scores tell correct steps from incorrect ones. Pure numpy.

A solution has labels 1 (correct), 0 (neutral, ignored), -1 (incorrect), and P(step good) as scores:

    labels [1, 1, 0, -1]   scores [0.9, 0.8, 0.5, 0.1]   threshold 0.5 -> predicted [correct, correct, -, incorrect]

Macro-F1 is the mean of the F1 of the correct and of the incorrect class. Three numbers are called "overall":
[`~trl_mprm.cards.measures`] says which paper prints which.
"""

from collections.abc import Sequence

import numpy as np

from ..data.aggregates import AGGREGATES
from .intervals import interval, resample
from .step_counts import Steps, check_scores, class_f1


# PRMBench's nine kinds of error, under the names of its file, by the three dimensions of its paper.
PRMBENCH_DIMENSIONS = {
    "simplicity": ("redundency", "circular"),
    "soundness": ("counterfactual", "step_contradiction", "domain_inconsistency", "confidence"),
    "sensitivity": ("missing_condition", "deception", "multi_solutions"),
}

# Defined for all sources together only: for one source they would equal its `macro_f1` and `processbench_f1`.
_OF_ALL_SOURCES = (
    "macro_f1_step_weighted",
    "macro_f1_pooled",
    "macro_f1_source_mean",
    "processbench_f1_source_mean",
)


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
            Source of each solution. Defaults to one source, `"all"`.
        groups (`Sequence[str | int]`, *optional*):
            Question of each solution; folds and bootstrap keep a question together. By default each solution has its
            own.
        threshold (`float` or `str`, *optional*, defaults to `"held_out"`):
            A number in [0, 1] is used directly (protocol `fixed`). `"held_out"` deals the questions into 5 folds (fewer
            if there are fewer questions), each of which uses the [`best_threshold`] of the others. `"oracle"` uses the
            best threshold on the same steps that are measured, as the paper's code does, which makes the figures too high.
        n_resamples (`int`, *optional*, defaults to `1000`):
            Bootstrap resamples of questions, drawn with `seed`. 0 skips the intervals.

    Returns:
        `dict`, ready for JSON:
        - the three `macro_f1_*`;
        - over all steps, independent of the threshold: `auc`; `average_precision_correct` and
          `average_precision_incorrect`, with that class as the one to find; `brier`, the mean squared distance between
          score and label; `calibration_error` (ECE), the mean distance between score and share of correct steps over
          15 bins of equal width, weighted by steps, see [`calibration_bins`];
        - `first_error_accuracy`: share of solutions whose first step predicted incorrect is the first step labelled
          incorrect, or that have neither. Neutral steps are skipped; solutions with no other step are left out.
          `first_error_accuracy_erroneous` and `_correct`: the same over the solutions with and without an error.
          `processbench_f1`: harmonic mean of these two, the score of ProcessBench (arXiv 2412.06559), and
          `processbench_f1_source_mean`, which its paper prints as the average;
        - `threshold` (one number, or one per fold) and `threshold_protocol` (`fixed`, `held_out` or `oracle`);
        - `n_solutions`, `n_steps` (= `n_correct` + `n_incorrect`), `n_correct`, `n_incorrect`, `n_neutral`;
        - `intervals`: `[low, high]` of all these measures, 95% percentile bootstrap over questions. Predictions are held
          fixed, so the spread does not include the choice of the threshold;
        - `sources`: per source `macro_f1`, `f1_correct`, `f1_incorrect`, the other measures, and counts.

        Undefined values are `None`, never NaN: F1 of a class without labelled steps, macro-F1, AUC and average precision
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
    steps = Steps(labels, scores, sources, groups)
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
    samples = resample(overall, steps.n_groups, n_resamples, seed)
    return {
        **{name: _or_none(value) for name, value in overall(np.ones(steps.n_groups)).items()},
        "threshold": threshold,
        "threshold_protocol": protocol,
        "n_solutions": steps.n_solutions,
        **_step_counts(totals.sum(0), steps.neutral.sum()),
        "intervals": {name: interval(values, steps.n_groups) for name, values in samples.items()},
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

    Both models are measured on the same resampled questions, so that the difficulty of a question cancels out.

    Args:
        labels, sources, groups, threshold, n_resamples, seed:
            As in [`step_metrics`]; the threshold protocol is applied to each model alone.
        first, second (`Sequence[Sequence[float]]`):
            Scores of the two models.

    Returns:
        `dict`: for each measure of [`step_metrics`] that is defined, `first`, `second`, `difference` (first minus
        second), its 95% `interval`, and a two-sided `p_value`: twice the share of resamples on the rarer side of zero,
        with one added to both counts. It is 1 for equal models, and never below `2 / (n_resamples + 1)`.

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
        steps = Steps(labels, scores, sources, groups)
        measures.append(steps.overall(steps.predict(threshold)[0]))

    def difference(weight: np.ndarray) -> dict[str, float]:
        one, other = (measure(weight) for measure in measures)
        return {name: one[name] - other[name] for name in one}

    one, other = (measure(np.ones(steps.n_groups)) for measure in measures)
    tests = {}
    for name, values in resample(difference, steps.n_groups, n_resamples, seed).items():
        if not np.isnan(one[name] - other[name]):
            values = values[~np.isnan(values)]
            rarer = min((values <= 0).sum(), (values >= 0).sum())
            tests[name] = {
                "first": float(one[name]),
                "second": float(other[name]),
                "difference": float(one[name] - other[name]),
                "interval": interval(values, steps.n_groups),
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

    Where candidates tie for first place, the mean of their correctness counts, so the order of candidates does not matter.

    Args:
        correct (`Sequence[bool]`):
            Whether the answer of each candidate is correct.
        scores (`Sequence[Sequence[float]]`):
            P(step good) of the steps of each candidate.
        groups (`Sequence[str | int]`):
            Question of each candidate.
        sources (`Sequence[str]`, *optional*):
            Source of each candidate. Defaults to one source, `"all"`.
        n_resamples, seed:
            As in [`step_metrics`].

    Returns:
        `dict`: `accuracy_mean`, `accuracy_min`, `accuracy_product`, `accuracy_last`, one for each of `AGGREGATES`;
        `pass_at_1`, the share of correct candidates, which a random choice reaches on average; `pass_at_n`, the share of
        questions with a correct candidate, which no choice can beat; their `intervals`; `n_questions`, `n_candidates`
        (fewest and most per question); and the same by source.

    Examples:
    ```python
    >>> from trl_mprm.evaluation.metrics import best_of_n_metrics
    >>> metrics = best_of_n_metrics([True, False, False], [[0.9, 0.4], [0.6, 0.6], [0.1]], ["q", "q", "q"])
    >>> metrics["accuracy_mean"], metrics["accuracy_min"], round(metrics["pass_at_1"], 2)  # 0.65 > 0.6; 0.4 < 0.6
    (1.0, 0.0, 0.33)

    ```
    """
    sources = ["all"] * len(correct) if sources is None else sources
    for name, values in (("groups", groups), ("sources", sources)):
        if len(values) != len(correct):
            raise ValueError(f"correct has {len(correct)} candidates, {name} {len(values)}: expected as many")
    check_candidates(correct, scores)
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
        samples = resample(
            lambda weight: dict(zip(names, weight @ rows / weight.sum(), strict=True)), len(rows), n_resamples, seed
        )
        return {
            **dict(zip(names, rows.mean(0).tolist(), strict=True)),
            "intervals": {name: interval(values, len(rows)) for name, values in samples.items()},
            "n_questions": len(rows),
            "n_candidates": [int(sizes.min()), int(sizes.max())],
        }

    of = {str(name): source_of == name for name in np.unique(source_of)}
    return measured(table, sizes) | {"sources": {name: measured(table[own], sizes[own]) for name, own in of.items()}}


def check_candidates(correct: Sequence[bool], scores: Sequence[Sequence[float]]) -> None:
    """Raise `ValueError`, naming the candidate, unless each is marked right or wrong and has scores in [0, 1]."""
    if len(scores) != len(correct):
        raise ValueError(f"correct has {len(correct)} candidates, scores {len(scores)}: expected as many")
    if not len(correct):
        raise ValueError("expected at least one candidate, got none")
    for index, (right, steps) in enumerate(zip(correct, scores, strict=True)):
        if right not in (True, False):
            raise ValueError(f"candidate {index}: correct is {right!r:.60}, expected True or False")
        if not len(steps):
            raise ValueError(f"candidate {index} has no scores, expected one per step: leave its question out")
        check_scores(f"candidate {index}", steps)


def prmbench_scores(metrics: dict) -> dict[str, float | None]:
    """
    Compute PRMBench's scores (arXiv 2501.03124) from [`step_metrics`] whose sources are its kinds of error.

    PRMScore is the mean of the F1 of correct steps and the F1 of incorrect steps, over all steps (`overall`) and for each
    kind. `multi_solutions` has no incorrect steps, so its column is the F1 of correct steps. The score of a dimension is
    the mean over its kinds.

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


def _step_counts(counts: np.ndarray, neutral: int) -> dict[str, int]:
    incorrect, correct = (int(count) for count in counts.sum(-1))
    return {"n_steps": correct + incorrect, "n_correct": correct, "n_incorrect": incorrect, "n_neutral": int(neutral)}


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
