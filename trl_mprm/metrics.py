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

import numpy as np


FOLDS = 5


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
        - the three `macro_f1_*`, and `auc` of all steps together;
        - `first_error_accuracy`: share of solutions whose first step predicted incorrect is the first step labelled
          incorrect, or that have neither. Neutral steps are skipped; solutions with no other step are left out;
        - `threshold` (one number, or one per fold) and `threshold_protocol` (`fixed`, `held_out` or `oracle`);
        - `n_solutions`, `n_steps` (= `n_correct` + `n_incorrect`), `n_correct`, `n_incorrect`, `n_neutral`;
        - `intervals`: `[low, high]` of the five numbers, 95% percentile bootstrap over questions. Predictions stay as
          they are, so the spread leaves out the choice of the threshold;
        - `sources`: per source `macro_f1`, `f1_correct`, `f1_incorrect`, `auc`, `first_error_accuracy` and counts.

        What is undefined is `None`, never NaN: F1 of a class that labels no step, macro-F1 and AUC where a class is
        absent, intervals of fewer than two questions. The two means over sources leave undefined sources out.

    Raises:
        `ValueError`: unequal lengths, a label or score out of range (the solution is named), an unknown threshold,
        `"held_out"` with fewer than two questions.

    Examples:
    ```python
    >>> from trl_mprm.metrics import step_metrics
    >>> metrics = step_metrics([[1, 1, 0, -1], [1, -1]], [[0.9, 0.8, 0.5, 0.1], [0.7, 0.6]], threshold=0.5)
    >>> round(metrics["macro_f1_pooled"], 4)  # correct: 2*3/(2*3+1) = 6/7; incorrect: 2*1/(2*1+1) = 2/3
    0.7619
    >>> metrics["auc"], metrics["first_error_accuracy"], metrics["n_steps"]
    (1.0, 0.5, 5)

    ```
    """
    n_solutions = len(labels)
    sources = ["all"] * n_solutions if sources is None else sources
    groups = range(n_solutions) if groups is None else groups
    for name, values in (("scores", scores), ("sources", sources), ("groups", groups)):
        if len(values) != n_solutions:
            raise ValueError(f"labels have {n_solutions} solutions, {name} {len(values)}: expected as many")
    label, score, solution = _flatten(labels, scores)
    source_names, source_of = np.unique([str(source) for source in sources], return_inverse=True)
    group_names, group_of = np.unique([str(group) for group in groups], return_inverse=True)

    neutral = np.bincount(source_of[solution[label == 0]], minlength=len(source_names))
    kept = label != 0
    correct, score, solution = label[kept] == 1, score[kept], solution[kept]
    source, group = source_of[solution], group_of[solution]
    if threshold == "held_out":
        fold_of = _folds(group_of, source_of)
        fold = fold_of[group]
        parts = [fold != k for k in range(fold_of.max() + 1)]
        threshold = [best_threshold(correct[part], score[part], source[part]) for part in parts]
        protocol, predicted = "held_out", score >= np.array(threshold)[fold]
    elif threshold == "oracle":
        threshold = best_threshold(correct, score, source)
        protocol, predicted = "oracle", score >= threshold
    elif isinstance(threshold, int | float) and 0 <= threshold <= 1:
        threshold = float(threshold)
        protocol, predicted = "fixed", score >= threshold
    else:
        raise ValueError(f'threshold must be "held_out", "oracle" or a number in [0, 1], got {threshold!r}')

    shape = (len(group_names), len(source_names), 2, 2)  # group, source, labelled correct, predicted correct
    counts = np.zeros(shape)
    np.add.at(counts, (group, source, correct * 1, predicted * 1), 1)
    hit = (_first(~correct, solution, n_solutions) == _first(~predicted, solution, n_solutions)).astype(float)
    hit[np.bincount(solution, minlength=n_solutions) == 0] = np.nan
    _, rank = np.unique(score, return_inverse=True)

    def overall(weight: np.ndarray) -> dict[str, float]:
        """The five numbers where question g counts `weight[g]` times."""
        total = np.tensordot(weight, counts, axes=1)
        macro_f1 = class_f1(total).mean(-1)
        return {
            "macro_f1_step_weighted": step_weighted_mean(macro_f1, total.sum((-1, -2))),
            "macro_f1_pooled": class_f1(total.sum(0)).mean(-1),
            "macro_f1_source_mean": step_weighted_mean(macro_f1, np.ones(len(source_names))),
            "auc": _auc(correct, rank, weight[group]),
            "first_error_accuracy": step_weighted_mean(hit, weight[group_of]),
        }

    totals = counts.sum(0)
    per_source = {}
    for code, name in enumerate(source_names):
        here, members = source == code, source_of == code
        f1_incorrect, f1_correct = class_f1(totals[code])
        per_source[str(name)] = {
            "macro_f1": _or_none((f1_incorrect + f1_correct) / 2),
            "f1_correct": _or_none(f1_correct),
            "f1_incorrect": _or_none(f1_incorrect),
            "auc": _or_none(_auc(correct[here], rank[here], np.ones(here.sum()))),
            "first_error_accuracy": _or_none(step_weighted_mean(hit[members], np.ones(members.sum()))),
            "n_solutions": int(members.sum()),
            **_step_counts(totals[code], neutral[code]),
        }
    return {
        **{name: _or_none(value) for name, value in overall(np.ones(len(group_names))).items()},
        "threshold": threshold,
        "threshold_protocol": protocol,
        "n_solutions": n_solutions,
        **_step_counts(totals.sum(0), neutral.sum()),
        "intervals": _intervals(overall, len(group_names), n_resamples, seed),
        "sources": per_source,
    }


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
    >>> from trl_mprm.metrics import step_weighted_mean
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
    >>> from trl_mprm.metrics import best_threshold
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
    macro_f1, n_steps = [], []
    for source in np.unique(sources):
        counts = np.empty((len(candidates), 2, 2))
        for label in (0, 1):
            passed = np.concatenate(([0], np.cumsum((sources == source) & (correct == label))))
            counts[:, label, 0], counts[:, label, 1] = passed[below], passed[-1] - passed[below]
        macro_f1.append(class_f1(counts).mean(-1))
        n_steps.append(counts[0].sum())
    if not macro_f1:
        return 0.5
    # Rounded, so that equal counts added up in another order still tie. Nothing defined ties too: 0.5.
    value = np.nan_to_num(step_weighted_mean(np.stack(macro_f1, axis=-1), n_steps)).round(12)
    best = candidates[value == value.max()]
    return float(best[np.lexsort((best, np.abs(best - 0.5)))[0]])


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


def _intervals(overall: Callable, n_groups: int, n_resamples: int, seed: int) -> dict[str, list[float] | None]:
    """95% percentile intervals of `overall(weight)` over resampled questions; undefined resamples are left out."""
    generator = np.random.default_rng(seed)
    draws = (generator.integers(0, n_groups, n_groups) for _ in range(n_resamples))
    samples = [overall(np.bincount(drawn, minlength=n_groups).astype(float)) for drawn in draws]
    intervals = {}
    for name in samples[0] if samples else ():
        values = np.array([sample[name] for sample in samples])
        values = values[~np.isnan(values)]
        intervals[name] = np.quantile(values, (0.025, 0.975)).tolist() if n_groups > 1 and len(values) else None
    return intervals


def _auc(correct: np.ndarray, rank: np.ndarray, weight: np.ndarray) -> float:
    """Chance that a correct step ranks above an incorrect one, ties counting half; `rank` numbers distinct scores."""
    good, bad = np.bincount(rank, weight * correct), np.bincount(rank, weight * ~correct)
    pairs = good.sum() * bad.sum()
    return float((good * (np.cumsum(bad) - bad / 2)).sum() / pairs) if pairs > 0 else np.nan


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
        bad = [value for value in score.tolist() if not (isinstance(value, float | int) and 0 <= value <= 1)]
        if bad:
            raise ValueError(f"solution {index}: scores must be numbers in [0, 1], got {bad[0]!r}")
    flat = np.concatenate([np.asarray(values, dtype=np.float64) for values in (*labels, *scores)])
    return *np.split(flat, 2), np.repeat(np.arange(len(labels)), [len(label) for label in labels])


def _step_counts(counts: np.ndarray, neutral: int) -> dict[str, int]:
    incorrect, correct = (int(count) for count in counts.sum(-1))
    return {"n_steps": correct + incorrect, "n_correct": correct, "n_incorrect": incorrect, "n_neutral": int(neutral)}


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
