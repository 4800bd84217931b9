"""Step metrics: laws, scikit-learn, a naive twin of the threshold search, numbers by hand, and the paper's tables."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import average_precision_score, brier_score_loss, f1_score, roc_auc_score

from trl_mprm.data.aggregates import AGGREGATES
from trl_mprm.evaluation.metrics import best_of_n_metrics, paired_bootstrap, prmbench_scores, step_metrics
from trl_mprm.evaluation.published_results import TABLES, VISUALPROCESSBENCH_STEPS
from trl_mprm.evaluation.step_counts import best_threshold, calibration_bins, class_f1, step_weighted_mean


OVERALL = (
    *("macro_f1_step_weighted", "macro_f1_pooled", "macro_f1_source_mean"),
    *("auc", "average_precision_correct", "average_precision_incorrect", "brier", "calibration_error"),
    *("first_error_accuracy", "first_error_accuracy_erroneous", "first_error_accuracy_correct"),
    *("processbench_f1", "processbench_f1_source_mean"),
)

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
        _assert_probability_measures(source, labels[here], scores[here])
    _assert_probability_measures(metrics, labels, scores)


def _assert_probability_measures(metrics, labels, scores):
    correct = labels == 1
    for name, truth, score in (("correct", correct, scores), ("incorrect", ~correct, -scores)):
        expected = average_precision_score(truth, score)
        assert metrics[f"average_precision_{name}"] == pytest.approx(expected, abs=1e-12)
    assert metrics["brier"] == pytest.approx(brier_score_loss(correct, scores), abs=1e-12)
    share, mean = calibration_curve(correct, scores, n_bins=15, strategy="uniform")
    edges = np.linspace(0, 1, 16)
    n_steps = np.histogram(np.searchsorted(edges[1:-1], scores), bins=np.arange(16))[0]
    expected = np.average(np.abs(share - mean), weights=n_steps[n_steps > 0])
    assert metrics["calibration_error"] == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)
@given(solutions())
def test_calibration_bins_hold_every_step_and_their_distance_is_the_error(items):
    labels, scores, _, _ = zip(*items, strict=True)
    metrics, bins = measure(items), calibration_bins(labels, scores)
    assert sum(bin["n_steps"] for bin in bins) == metrics["n_steps"]
    distance = [bin["n_steps"] * abs(bin["mean_score"] - bin["share_correct"]) for bin in bins if bin["n_steps"]]
    if distance:
        assert metrics["calibration_error"] == pytest.approx(sum(distance) / metrics["n_steps"], abs=1e-12)
    assert all(bin["low"] - 1e-4 <= bin.get("mean_score", bin["low"]) <= bin["high"] + 1e-4 for bin in bins)


def processbench(labels, predictions):
    """ProcessBench's score as its paper words it: index of the first error, -1 for none; accuracies; harmonic mean."""
    match = np.array(labels) == np.array(predictions)
    erroneous = np.array(labels) != -1
    if erroneous.all() or not erroneous.any():
        return None
    accuracies = match[erroneous].mean(), match[~erroneous].mean()
    return 2 * accuracies[0] * accuracies[1] / sum(accuracies) if sum(accuracies) else 0.0


@settings(deadline=None)
@given(solutions(), SCORE)
def test_processbench_f1(items, threshold):
    # ProcessBench labels the steps before the first error, the error, and nothing after it.
    items = [
        ([1] * sum(y == 1 for y in labels) + [-1] * (-1 in labels) + [0] * (len(labels) - 1), source, group)
        for labels, _, source, group in items
    ]
    items = [each for each in items if set(each[0]) != {0} and each[0]]
    if not items:
        return
    generator = np.random.default_rng(len(items))
    items = [(y, generator.choice([0.1, 0.5, 0.9], len(y)).tolist(), source, group) for y, source, group in items]
    metrics = measure(items, threshold)
    truth = [y.index(-1) if -1 in y else -1 for y, *_ in items]
    # A prediction after the first error is a miss, whether it counts as such or is ignored as unlabelled.
    found = [next((i for i, score in enumerate(s) if score < threshold), -1) for _, s, *_ in items]
    found = [-1 if -1 not in y and index >= y.count(1) else index for (y, *_), index in zip(items, found, strict=True)]
    expected = processbench(truth, found)
    assert metrics["processbench_f1"] == (expected if expected is None else pytest.approx(expected))
    sources = np.array([source for *_, source, _ in items])
    of = [processbench(np.array(truth)[sources == s], np.array(found)[sources == s]) for s in sorted(set(sources))]
    assert [source["processbench_f1"] for source in metrics["sources"].values()] == [
        value if value is None else pytest.approx(value) for value in of
    ]
    defined = [value for value in of if value is not None]
    mean = metrics["processbench_f1_source_mean"]
    assert mean == (pytest.approx(np.mean(defined)) if defined else None)


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
    # Of the two solutions with an error both are hit, of the two without one is.
    assert (metrics["first_error_accuracy_erroneous"], metrics["first_error_accuracy_correct"]) == (1.0, 0.5)
    assert metrics["processbench_f1"] == pytest.approx(2 / 3)
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
    assert [nothing[name] for name in OVERALL] == [None] * len(OVERALL)
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


@settings(deadline=None)
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


def test_best_threshold_is_no_worse_than_the_sweep_of_the_paper():
    # Its code tries 1,000 thresholds; here as many steps as VisualProcessBench has, some scores right by chance alone.
    steps = np.array(list(VISUALPROCESSBENCH_STEPS.values()))
    sources = np.repeat(np.arange(len(steps)), steps.sum(1))
    correct = np.repeat(np.tile([True, False], len(steps)), steps.ravel())
    scores = np.clip(np.random.default_rng(0).normal(0.45 + 0.1 * correct, 0.2), 0, 1)

    def macro_f1(threshold):
        predicted, values = scores >= threshold, []
        for good in (True, False):
            hits = np.bincount(sources, (predicted == good) & (correct == good))
            values.append(2 * hits / (np.bincount(sources, predicted == good) + np.bincount(sources, correct == good)))
        return (np.mean(values, axis=0) * steps.sum(1)).sum()

    assert macro_f1(best_threshold(correct, scores, sources)) >= max(map(macro_f1, np.arange(1000) / 1000))


@pytest.mark.slow
def test_bench_threshold(tmp_path):
    script = Path(__file__).parents[2] / "recipes" / "bench" / "threshold.py"
    argv = [sys.executable, script, "--repeats", "1", "--json", tmp_path / "bench.json"]
    run = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr  # it stops where a sweep finds a better threshold
    results = json.loads((tmp_path / "bench.json").read_text())
    assert results["steps"] == 24_276 and results["python_over_ours"] > 1 and results["numpy_over_ours"] > 1
    python, numpy, ours = results["macro_f1"].values()
    assert python == pytest.approx(numpy, abs=1e-12) and ours >= numpy


@settings(deadline=None)
@given(solutions(), st.randoms())
def test_order_of_solutions_does_not_matter(items, random):
    shuffled = random.sample(items, len(items))
    for threshold in (0.5, "oracle", "held_out"):
        if threshold == "held_out" and len({item[3] for item in items}) < 2:
            continue
        before, after = (measure(each, threshold, n_resamples=5) for each in (items, shuffled))
        assert [before[name] for name in OVERALL] == pytest.approx([after[name] for name in OVERALL], nan_ok=True)
        assert before["threshold"] == after["threshold"]
        for name, source in before["sources"].items():
            assert after["sources"][name] == pytest.approx(source)
        for name, interval in before["intervals"].items():
            assert after["intervals"][name] == (interval if interval is None else pytest.approx(interval))


@settings(deadline=None)
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


@settings(deadline=None)
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


def test_paired_bootstrap():
    items = random_items(300)
    labels, scores, sources, groups = zip(*items, strict=True)
    generator = np.random.default_rng(1)
    worse = [np.clip(np.array(s) + generator.normal(0, 0.5, len(s)), 0, 1).tolist() for s in scores]
    both = paired_bootstrap(labels, scores, worse, sources, groups, threshold=0.5, n_resamples=300)
    one, other = (
        step_metrics(labels, each, sources, groups, threshold=0.5, n_resamples=0) for each in (scores, worse)
    )
    for name, test in both.items():
        assert (test["first"], test["second"]) == (one[name], other[name])
        assert test["difference"] == pytest.approx(one[name] - other[name])
        assert test["interval"][0] <= test["difference"] <= test["interval"][1]
    assert both["auc"]["p_value"] == pytest.approx(2 / 301) and both["auc"]["interval"][0] > 0
    # Of equal models nothing differs; turned round, the sign changes and the p-value stays.
    same = paired_bootstrap(labels, scores, scores, sources, groups, n_resamples=20)
    assert {test["p_value"] for test in same.values()} == {1.0} and same["auc"]["interval"] == [0.0, 0.0]
    turned = paired_bootstrap(labels, worse, scores, sources, groups, threshold=0.5, n_resamples=300)
    assert turned["auc"]["difference"] == -both["auc"]["difference"]
    assert turned["auc"]["p_value"] == both["auc"]["p_value"]


def test_paired_bootstrap_is_narrower_than_two_intervals():
    # Two models with nearly the same scores on questions of very different difficulty.
    items = random_items(200)
    labels, scores, _, groups = zip(*items, strict=True)
    near = [[min(1.0, value + 0.01 * (index % 2)) for index, value in enumerate(s)] for s in scores]
    test = paired_bootstrap(labels, scores, near, groups=groups, threshold=0.5, n_resamples=300)["brier"]
    alone = step_metrics(labels, scores, groups=groups, threshold=0.5, n_resamples=300)["intervals"]["brier"]
    assert np.ptp(test["interval"]) < np.ptp(alone) / 5


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.booleans(), st.lists(SCORE, min_size=1, max_size=4)), min_size=1, max_size=5),
        min_size=1,
        max_size=6,
    )
)
def test_best_of_n_against_brute_force(questions):
    flat = [(good, steps, f"q{q}", "ab"[q % 2]) for q, each in enumerate(questions) for good, steps in each]
    metrics = best_of_n_metrics(*zip(*flat, strict=True), n_resamples=3)
    for name, aggregate in AGGREGATES.items():
        accuracies = []
        for each in questions:
            top = max(aggregate(steps) for _, steps in each)
            firsts = [good for good, steps in each if aggregate(steps) == top]
            accuracies.append(sum(firsts) / len(firsts))
        assert metrics[f"accuracy_{name}"] == pytest.approx(np.mean(accuracies))
        own = np.mean(accuracies[::2])
        assert metrics["sources"]["a"][f"accuracy_{name}"] == pytest.approx(own)
    assert metrics["pass_at_1"] == pytest.approx(np.mean([np.mean([good for good, _ in each]) for each in questions]))
    assert metrics["pass_at_n"] == pytest.approx(np.mean([any(good for good, _ in each) for each in questions]))
    assert metrics["n_candidates"] == [min(map(len, questions)), max(map(len, questions))]
    assert metrics["pass_at_n"] + 1e-9 >= metrics["accuracy_mean"]


def test_best_of_n_does_not_depend_on_the_order_of_candidates():
    # A model that gives every candidate the same score is as good as chance, wherever the correct ones stand.
    metrics = best_of_n_metrics([True, False, False, False], [[0.5]] * 4, ["q"] * 4)
    assert metrics["accuracy_mean"] == metrics["pass_at_1"] == 0.25
    with pytest.raises(ValueError, match="correct has 1 candidates, groups 2: expected as many"):
        best_of_n_metrics([True], [[0.5]], ["q", "q"])
    with pytest.raises(ValueError, match="expected at least one candidate"):
        best_of_n_metrics([], [], [])


def test_prmbench_dimensions_are_those_it_prints():
    table = TABLES["prmbench"][0]
    # Averages of simplicity, soundness and sensitivity beside the same rows of its README.
    printed = {"Llemma-PRM800k-7B": (51.4, 50.9, 66.0), "MathShepherd-Mistral-7B": (47.1, 45.7, 60.7)}
    for name, *figures in table.rows:
        if name in printed:
            sources = {
                kind: {"macro_f1": x, "f1_correct": x} for kind, x in zip(table.columns, figures[1:], strict=True)
            }
            scores = prmbench_scores({"macro_f1_pooled": figures[0], "sources": sources})
            dimensions = [scores[dimension] for dimension in ("simplicity", "soundness", "sensitivity")]
            assert dimensions == pytest.approx(printed[name], abs=0.1)
            assert scores["overall"] == figures[0]


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


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([[0.5], []], "candidate 1 has no scores, expected one per step"),
        ([[], [0.5]], "candidate 0 has no scores"),
        ([[0.5], [0.5, float("nan")]], r"candidate 1: scores must be numbers in \[0, 1\], got nan"),
        ([[0.5], [None]], "candidate 1: scores must be numbers in .* got None"),
        ([[0.5], [2.0]], "candidate 1: scores must be numbers in .* got 2.0"),
    ],
)
def test_errors_of_best_of_n(scores, message):
    with pytest.raises(ValueError, match=message):
        best_of_n_metrics([True, False], scores, ["q", "q"])


CORRECT_STEPS, INCORRECT_STEPS = np.array(list(VISUALPROCESSBENCH_STEPS.values())).T


def test_the_paper_prints_the_step_weighted_mean():
    rows = TABLES["visualprocessbench"][0].rows
    assert len(rows) == 39
    for name, printed, *per_source in rows:
        recomputed = step_weighted_mean(per_source, CORRECT_STEPS + INCORRECT_STEPS)
        # The one row that does not follow from its own columns.
        expected = 63.39 if name == "InternVL2.5-8B Random-5%" else printed
        assert recomputed == pytest.approx(expected, abs=0.015), name


def test_all_correct_predictor_on_visualprocessbench():
    # Reference point: predicting "correct" everywhere gives 40.53 step-weighted and 40.59 pooled.
    zeros = np.zeros(5)
    counts = np.stack([np.stack([zeros, INCORRECT_STEPS], -1), np.stack([zeros, CORRECT_STEPS], -1)], -2)
    per_source = 100 * class_f1(counts).mean(-1)
    assert step_weighted_mean(per_source, counts.sum((-1, -2))) == pytest.approx(40.53, abs=0.005)
    assert 100 * class_f1(counts.sum(0)).mean() == pytest.approx(40.59, abs=0.005)


def test_visualprm_prints_more_than_the_step_weighted_mean():
    # Which is why its overall stands in a table of its own, beside our pooled macro-F1.
    rows = [row for row in TABLES["visualprocessbench"][1].rows if None not in row]
    weights = [sum(steps) for steps in VISUALPROCESSBENCH_STEPS.values()]
    assert len(rows) == 5
    assert all(overall > step_weighted_mean(columns, weights) for _, overall, *columns in rows)
