"""Step metrics: laws, scikit-learn, a naive twin of the threshold search, numbers by hand, and the paper's tables."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, roc_auc_score

from trl_mprm.metrics import best_threshold, class_f1, step_metrics, step_weighted_mean


OVERALL = ("macro_f1_step_weighted", "macro_f1_pooled", "macro_f1_source_mean", "auc", "first_error_accuracy")

# A coarse grid of scores makes ties common.
SCORE = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), st.floats(0, 1))


@st.composite
def solutions(draw, min_size=2):
    """Solutions as (labels, scores, source, group)."""
    steps = st.lists(st.tuples(st.sampled_from([1, 0, -1]), SCORE), min_size=1, max_size=5)
    drawn = draw(st.lists(st.tuples(steps, st.integers(0, 7)), min_size=min_size, max_size=12))
    # A question belongs to one source.
    return [([y for y, _ in steps], [s for _, s in steps], "abc"[g % 3], f"q{g}") for steps, g in drawn]


def measure(items, threshold=0.5, **kwargs):
    labels, scores, sources, groups = zip(*items, strict=True)
    return step_metrics(labels, scores, sources, groups, threshold=threshold, **{"n_resamples": 0, **kwargs})


def flat(items):
    """Labels, scores and sources of the steps that count."""
    steps = [(y, s, source) for labels, scores, source, _ in items for y, s in zip(labels, scores, strict=True) if y]
    return tuple(np.array(column) for column in zip(*steps, strict=True)) if steps else (np.array([]),) * 3


def random_items(n=300, seed=0):
    generator = np.random.default_rng(seed)
    items = []
    for index in range(n):
        labels = generator.choice([1, 0, -1], size=generator.integers(1, 9), p=[0.6, 0.1, 0.3])
        scores = 1 / (1 + np.exp(-labels - generator.normal(size=len(labels))))
        group = index // 3
        items.append((labels.tolist(), scores.round(2).tolist(), "abcde"[group % 5], f"question {group}"))
    return items


def test_against_scikit_learn():
    items = random_items()
    labels, scores, sources = flat(items)
    metrics = measure(items, threshold=0.45)
    predicted = np.where(scores >= 0.45, 1, -1)
    names, sizes = np.unique(sources, return_counts=True)
    of = [f1_score(labels[sources == name], predicted[sources == name], average="macro") for name in names]
    assert metrics["macro_f1_step_weighted"] == pytest.approx(np.average(of, weights=sizes), abs=1e-12)
    assert metrics["macro_f1_source_mean"] == pytest.approx(np.mean(of), abs=1e-12)
    assert metrics["macro_f1_pooled"] == pytest.approx(f1_score(labels, predicted, average="macro"), abs=1e-12)
    assert metrics["auc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    for name in names:
        here, source = sources == name, metrics["sources"][name]
        assert source["f1_correct"] == pytest.approx(f1_score(labels[here], predicted[here], pos_label=1), abs=1e-12)
        assert source["f1_incorrect"] == pytest.approx(
            f1_score(labels[here], predicted[here], pos_label=-1), abs=1e-12
        )
        assert source["auc"] == pytest.approx(roc_auc_score(labels[here], scores[here]), abs=1e-12)
        assert source["n_steps"] == here.sum()


def test_by_hand():
    metrics = step_metrics(
        labels=[[1, -1, -1], [1, 0, 1], [1, 1], [-1, -1]],
        scores=[[0.9, 0.4, 0.8], [0.7, 0.0, 0.6], [0.5, 0.3], [0.2, 0.1]],
        sources=["a", "a", "b", "b"],
        threshold=0.5,
        n_resamples=0,
    )
    # Source a, neutral left out: labels + - - + +, predicted + - + + +. TP 3, FP 1, TN 1, FN 0.
    f1_a = (6 / 7 + 2 / 3) / 2
    # Source b: labels + + - -, predicted + - - -. TP 1, FN 1, TN 2, FP 0.
    f1_b = (2 / 3 + 4 / 5) / 2
    # Together: TP 4, FP 1, TN 3, FN 1.
    pooled = (8 / 10 + 6 / 8) / 2
    assert metrics["sources"]["a"]["macro_f1"] == pytest.approx(f1_a)
    assert metrics["sources"]["b"]["macro_f1"] == pytest.approx(f1_b)
    assert metrics["macro_f1_step_weighted"] == pytest.approx((5 * f1_a + 4 * f1_b) / 9)
    assert metrics["macro_f1_source_mean"] == pytest.approx((f1_a + f1_b) / 2)
    assert metrics["macro_f1_pooled"] == pytest.approx(pooled)
    # Of 5 x 4 pairs of a correct and an incorrect step, 0.8 beats 0.7 0.6 0.5 0.3, and 0.4 beats 0.3.
    assert metrics["auc"] == pytest.approx(15 / 20)
    # First errors: step 1 found; none, none found; none, but one predicted; step 0 found.
    assert metrics["first_error_accuracy"] == 0.75
    assert metrics["sources"]["b"]["first_error_accuracy"] == 0.5
    assert (metrics["threshold"], metrics["threshold_protocol"]) == (0.5, "fixed")
    counts = [metrics[key] for key in ("n_solutions", "n_steps", "n_correct", "n_incorrect", "n_neutral")]
    assert counts == [4, 9, 5, 4, 1]


def test_score_at_the_threshold_is_predicted_correct():
    assert step_metrics([[1, -1]], [[0.5, 0.4999]], threshold=0.5)["macro_f1_pooled"] == 1.0


def test_undefined_is_none():
    metrics = step_metrics([[1, 1], [1, -1], [0]], [[0.9, 0.1], [0.9, 0.1], [0.5]], ["a", "b", "c"], threshold=0.5)
    assert (metrics["sources"]["a"]["f1_correct"], metrics["sources"]["a"]["f1_incorrect"]) == (
        pytest.approx(2 / 3),
        None,
    )
    assert metrics["sources"]["a"]["macro_f1"] is None and metrics["sources"]["a"]["auc"] is None
    assert metrics["sources"]["c"]["first_error_accuracy"] is None
    assert metrics["macro_f1_step_weighted"] == metrics["macro_f1_source_mean"] == 1.0  # source b alone
    nothing = step_metrics([[0], [0]], [[0.5], [0.5]])
    assert [nothing[name] for name in OVERALL] == [None] * 5
    assert nothing["intervals"] == dict.fromkeys(OVERALL)
    json.dumps([metrics, nothing], allow_nan=False)


def naive_best(labels, scores, sources):
    """Value of the best of all thresholds that can differ, each measured with scikit-learn."""
    best = -math.inf
    for threshold in {0.0, 1.0, *scores.tolist()}:
        total = weight = 0
        for name in np.unique(sources):
            here = sources == name
            if len(set(labels[here])) == 2:
                macro_f1 = f1_score(labels[here], np.where(scores[here] >= threshold, 1, -1), average="macro")
                total, weight = total + here.sum() * macro_f1, weight + here.sum()
        best = max(best, total / weight if weight else 0.0)
    return best


@settings(max_examples=60, deadline=None)
@given(solutions())
def test_oracle_finds_what_a_naive_sweep_finds(items):
    metrics = measure(items, "oracle")
    labels, scores, sources = flat(items)
    assert (metrics["macro_f1_step_weighted"] or 0.0) == pytest.approx(naive_best(labels, scores, sources), abs=1e-12)
    assert metrics["threshold_protocol"] == "oracle"


@given(solutions(), SCORE)
def test_oracle_is_at_least_any_fixed_threshold(items, threshold):
    oracle, fixed = (measure(items, t)["macro_f1_step_weighted"] for t in ("oracle", threshold))
    assert oracle is fixed is None or oracle >= fixed - 1e-12


@pytest.mark.parametrize(
    ("correct", "scores", "expected"),
    [
        ([True, False], [0.9, 0.2], 0.5),  # 0.5 lies in the gap
        ([True, False], [0.9, 0.7], 0.8),  # middle of the gap
        ([True, False], [0.3, 0.1], 0.2),
        ([True, True], [0.9, 0.7], 0.5),  # nothing to choose by
        ([], [], 0.5),
        ([True, False], [1.0, np.nextafter(1.0, 0.0)], 1.0),  # no float between: the upper one
    ],
)
def test_best_threshold_by_hand(correct, scores, expected):
    assert best_threshold(correct, scores) == pytest.approx(expected, abs=1e-15)


def test_best_threshold_prefers_the_nearest_to_one_half():
    # 0.325 mistakes the third step, 0.75 the second: macro-F1 is (4/5 + 2/3) / 2 both times, and 0.325 is nearer.
    assert best_threshold([False, True, False, True], [0.2, 0.45, 0.6, 0.9]) == pytest.approx(0.325)
    # The same distance on both sides: the lower.
    assert best_threshold([False, True, False, True], [0.2, 0.4, 0.6, 0.8]) == pytest.approx(0.3)


@given(solutions(), st.randoms())
def test_order_of_solutions_does_not_matter(items, random):
    shuffled = random.sample(items, len(items))
    for threshold in (0.5, "oracle", "held_out"):
        if threshold == "held_out" and len({item[3] for item in items}) < 2:
            continue
        before, after = (measure(each, threshold, n_resamples=5) for each in (items, shuffled))
        assert [before[name] for name in OVERALL] == pytest.approx([after[name] for name in OVERALL], nan_ok=True)
        assert before["threshold"] == after["threshold"]
        assert before["sources"] == after["sources"]
        for name, interval in before["intervals"].items():
            assert after["intervals"][name] == (interval if interval is None else pytest.approx(interval))


@given(solutions(), st.lists(SCORE, min_size=60, max_size=60))
def test_neutral_steps_do_not_matter(items, other):
    other = iter(other)
    changed = [
        (labels, [s if y else next(other) for y, s in zip(labels, scores, strict=True)], source, group)
        for labels, scores, source, group in items
    ]
    dropped = [
        ([y for y in labels if y], [s for y, s in zip(labels, scores, strict=True) if y], source, group)
        for labels, scores, source, group in items
    ]
    for threshold in (0.5, "oracle"):
        assert measure(items, threshold) == measure(changed, threshold)
        before, after = measure(items, threshold), measure(dropped, threshold)
        assert [before[name] for name in (*OVERALL, "threshold")] == [after[name] for name in (*OVERALL, "threshold")]


@given(solutions())
def test_monotone_transform_leaves_auc(items):
    # A table from rank to rank is monotone to the last bit, unlike a formula on floats.
    ranks = {score: index / 100 for index, score in enumerate(sorted({s for item in items for s in item[1]}))}
    moved = [(labels, [ranks[s] for s in scores], source, group) for labels, scores, source, group in items]
    assert measure(items)["auc"] == measure(moved)["auc"]


def test_held_out_threshold_never_sees_its_own_question():
    items = random_items(60)
    before = measure(items, "held_out")
    assert before["threshold_protocol"] == "held_out" and len(before["threshold"]) == 5
    moved = 0
    for question in {group for *_, group in items}:
        # Whatever happens to one question, the threshold of its own fold stays.
        flipped = [
            ([-y for y in y_], s, source, group) if group == question else (y_, s, source, group)
            for y_, s, source, group in items
        ]
        after = measure(flipped, "held_out")
        same = [a == b for a, b in zip(before["threshold"], after["threshold"], strict=True)]
        assert any(same)
        moved += same.count(False)
    assert moved > 0


def test_held_out_folds_by_hand():
    # Two questions, two folds: each is cut by the threshold of the other.
    items = [([1, -1], [0.9, 0.8], "a", "x"), ([1, -1], [0.3, 0.2], "a", "y")]
    metrics = measure(items, "held_out")
    assert metrics["threshold"] == pytest.approx([0.25, 0.85])
    # x at 0.25: both predicted correct; y at 0.85: both predicted incorrect. TP, FP, FN, TN are 1 each.
    assert metrics["macro_f1_pooled"] == 0.5
    assert measure(items, "oracle")["macro_f1_pooled"] == pytest.approx((2 / 3 + 4 / 5) / 2)


def test_held_out_folds_hold_every_source():
    items = random_items(300)
    metrics = measure(items, "held_out")
    assert len(metrics["threshold"]) == 5
    # Twenty questions of each source are dealt four a fold, so no fold's threshold is far from the others.
    assert np.ptp(metrics["threshold"]) < 0.1


def test_intervals():
    items = random_items(300)
    metrics = measure(items, n_resamples=400)
    for name in OVERALL:
        low, high = metrics["intervals"][name]
        assert low < metrics[name] < high
    assert measure(items, n_resamples=400) == metrics
    assert measure(items, n_resamples=400, seed=1)["intervals"] != metrics["intervals"]
    # Copies of solutions within their questions add no information; as questions of their own they would.
    doubled = measure(items * 2, n_resamples=400)
    assert doubled["intervals"]["auc"] == pytest.approx(metrics["intervals"]["auc"])


def test_interval_of_a_proportion():
    # First-error accuracy of 100 one-step questions, 80 right: the bootstrap is binomial, 0.8 +- 1.96 * 0.04.
    metrics = step_metrics([[1]] * 100, [[0.9]] * 80 + [[0.1]] * 20, threshold=0.5, n_resamples=4000)
    assert metrics["intervals"]["first_error_accuracy"] == pytest.approx([0.72, 0.88], abs=0.015)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], []), "expected at least one solution"),
        (([[1]], [[0.5], [0.5]]), "labels have 1 solutions, scores 2"),
        (([[1]], [[0.5]], ["a", "b"]), "labels have 1 solutions, sources 2"),
        (([[1]], [[0.5]], ["a"], []), "labels have 1 solutions, groups 0"),
        (([[1], [1, -1]], [[0.5], [0.5]]), "solution 1: 2 labels, 1 scores"),
        (([[1], [2]], [[0.5], [0.5]]), r"solution 1: labels must be 1 .* got \[2\]"),
        (([[True, False]], [[0.5, 0.5]]), r"solution 0: labels must be 1 .* got \[False, True\]"),
        (([[1]], [[float("nan")]]), "solution 0: scores must be numbers in .* got nan"),
        (([[1]], [[1.5]]), "solution 0: scores must be numbers in .* got 1.5"),
        (([[1]], [[None]]), "solution 0: scores must be numbers in .* got None"),
        (([[1]], [[0.5]], None, None, "best"), "threshold must be .* got 'best'"),
        (([[1]], [[0.5]], None, None, None), "threshold must be .* got None"),
        (([[1]], [[0.5]], None, None, 1.5), "threshold must be .* got 1.5"),
        (([[1]], [[0.5]]), "needs at least 2 questions"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        step_metrics(*arguments)
    assert "\n" not in str(error.value)


# Tables 2, 4 and 5 of the paper: printed Overall, then MathVision, MathVerse, MMMU, DynaMath, WeMath.
PAPER = """
InternVL2.5-8B Base                52.28 52.40 52.04 50.21 54.85 49.95
InternVL2.5-8B Full Hard 0         65.12 65.77 65.43 61.84 66.17 63.56
InternVL2.5-8B Full Hard 1/N       64.26 64.91 63.91 61.07 65.44 64.80
InternVL2.5-8B Full Hard 2/N       63.02 61.61 62.92 59.70 65.83 65.09
InternVL2.5-8B Full Soft           61.54 60.78 60.47 62.05 62.91 64.38
InternVL2.5-8B Random-5%           63.34 64.95 62.42 58.94 65.91 62.57
InternVL2.5-8B BIS-5%              64.51 66.66 64.53 60.30 63.80 64.40
InternVL2.5-8B Random-10%          62.86 64.65 62.14 60.25 62.98 63.25
InternVL2.5-8B BIS-10%             65.46 66.90 65.07 63.35 65.56 65.10
InternVL2.5-8B Random-15%          63.27 65.06 63.00 57.23 64.17 63.96
InternVL2.5-8B BIS-15%             64.98 67.09 64.44 61.80 64.58 65.40
InternVL2.5-8B Random-25%          63.37 64.49 62.60 58.32 65.83 63.67
InternVL2.5-8B BIS-25%             65.46 67.98 64.86 60.49 65.72 65.59
InternVL2.5-8B Random-35%          63.52 65.50 63.49 58.01 64.00 63.08
InternVL2.5-8B BIS-35%             64.98 67.25 64.47 59.61 65.79 64.82
InternVL2.5-8B Random-50%          64.02 64.55 63.94 60.25 65.38 64.14
InternVL2.5-8B BIS-50%             65.00 65.84 63.79 63.03 66.66 66.03
Qwen2.5-VL-7B Base                 49.68 50.22 49.58 49.85 49.62 48.51
Qwen2.5-VL-7B Full Hard 0          65.57 66.05 65.29 63.23 66.24 66.40
Qwen2.5-VL-7B Full Hard 1/N        65.27 66.17 64.53 63.83 66.60 64.55
Qwen2.5-VL-7B Full Hard 2/N        62.72 62.33 62.18 62.56 63.37 64.65
Qwen2.5-VL-7B Full Soft            62.23 62.17 61.25 61.44 62.88 65.55
Qwen2.5-VL-7B Random-5%            53.54 54.38 52.82 55.85 52.80 53.04
Qwen2.5-VL-7B BIS-5%               64.42 66.69 64.20 62.72 63.34 63.12
Qwen2.5-VL-7B Random-10%           61.99 63.42 61.85 58.37 62.24 61.97
Qwen2.5-VL-7B BIS-10%              64.63 66.05 64.14 61.33 64.64 66.05
Qwen2.5-VL-7B Random-15%           59.82 59.32 60.58 54.97 61.32 60.36
Qwen2.5-VL-7B BIS-15%              65.29 66.50 64.03 66.40 64.80 66.58
Qwen2.5-VL-7B Random-25%           64.44 65.87 63.38 61.99 66.32 63.44
Qwen2.5-VL-7B BIS-25%              65.53 66.84 64.48 63.60 66.19 66.66
Qwen2.5-VL-7B Random-35%           64.77 66.45 64.43 60.47 65.34 64.84
Qwen2.5-VL-7B BIS-35%              65.69 66.77 65.50 63.37 65.65 65.99
Qwen2.5-VL-7B Random-50%           64.54 66.52 64.27 59.74 65.73 62.89
Qwen2.5-VL-7B BIS-50%              65.02 67.22 64.30 60.80 65.62 64.99
InternVL2.5-8B Mixed-25%           64.70 66.32 64.78 58.65 65.66 64.51
InternVL2.5-8B Reliable-25%        62.75 62.12 63.14 60.52 63.85 63.14
InternVL2.5-8B Low-MC-25%          64.18 66.31 64.31 59.40 64.16 62.97
InternVL2.5-8B BIS-25% alpha 0.02  64.84 66.63 64.69 60.49 64.78 65.27
InternVL2.5-8B BIS-25% alpha 0.08  64.86 67.10 64.47 59.96 64.88 65.35
"""
# Steps of VisualProcessBench labelled correct and incorrect, in the same order of sources.
CORRECT_STEPS = np.array([3875, 5767, 1698, 3469, 1776])
INCORRECT_STEPS = np.array([2350, 2960, 708, 1091, 582])


def test_the_paper_prints_the_step_weighted_mean():
    rows = [line.rsplit(maxsplit=6) for line in PAPER.strip().splitlines()]
    assert len(rows) == 39
    for name, printed, *per_source in rows:
        recomputed = step_weighted_mean([float(f1) for f1 in per_source], CORRECT_STEPS + INCORRECT_STEPS)
        # The one row that does not follow from its own columns.
        expected = 63.39 if name == "InternVL2.5-8B Random-5%" else float(printed)
        assert recomputed == pytest.approx(expected, abs=0.015), name


def test_all_correct_predictor_on_visualprocessbench():
    # Reference point: predicting "correct" everywhere gives 40.53 step-weighted and 40.59 pooled.
    zeros = np.zeros(5)
    counts = np.stack([np.stack([zeros, INCORRECT_STEPS], -1), np.stack([zeros, CORRECT_STEPS], -1)], -2)
    per_source = 100 * class_f1(counts).mean(-1)
    assert step_weighted_mean(per_source, counts.sum((-1, -2))) == pytest.approx(40.53, abs=0.005)
    assert 100 * class_f1(counts.sum(0)).mean() == pytest.approx(40.59, abs=0.005)
