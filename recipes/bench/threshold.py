"""
How fast is the exact best threshold? Against sweeps of 1,000 thresholds, in plain Python and in numpy.

    python recipes/bench/threshold.py                     # 24,276 steps, as VisualProcessBench has; about a minute
    python recipes/bench/threshold.py --json bench.json

The paper's code tries up to 1,000 thresholds and measures each in a pass over all steps. `best_threshold` sorts once
and reads every split off cumulative counts, so it also finds the thresholds between the thousand. Labels are those of
VisualProcessBench by source, scores come from a seed. The contestants run in turn, so that a slow minute of the machine
hits all of them; the ratios are ratios of medians.
"""

import os
import sys


# A neighbour of this file is named like a module of the standard library: its folder goes to the end of the path.
sys.path.sort(key=os.path.dirname(os.path.abspath(__file__)).__eq__)

import argparse
import json
import statistics
import time

import numpy as np
from tabulate import tabulate

from trl_mprm.evaluation.published_results import VISUALPROCESSBENCH_STEPS
from trl_mprm.evaluation.step_counts import best_threshold, class_f1, step_weighted_mean


THRESHOLDS = [k / 1000 for k in range(1000)]


def make_steps(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, scores and sources of 24,276 steps."""
    generator = np.random.default_rng(seed)
    counts = list(VISUALPROCESSBENCH_STEPS.values())
    correct = np.concatenate([[True] * good + [False] * bad for good, bad in counts])
    scores = 1 / (1 + np.exp(-0.5 * (2 * correct - 1) - generator.normal(0.8, 1, len(correct))))
    return correct, scores, np.repeat(np.arange(len(counts)), [sum(count) for count in counts])


def python_sweep(correct: list[bool], scores: list[float], sources: list[int]) -> float:
    """Best step-weighted macro-F1 of 1,000 thresholds, one pass over the steps each."""
    best = 0.0
    for threshold in THRESHOLDS:
        counts = [[0, 0, 0, 0] for _ in range(max(sources) + 1)]
        for label, score, source in zip(correct, scores, sources, strict=True):
            counts[source][2 * label + (score >= threshold)] += 1
        total = steps = 0.0
        for true_bad, false_good, false_bad, true_good in counts:
            f1_bad = 2 * true_bad / (2 * true_bad + false_good + false_bad)
            f1_good = 2 * true_good / (2 * true_good + false_good + false_bad)
            number = true_bad + false_good + false_bad + true_good
            total, steps = total + number * (f1_bad + f1_good) / 2, steps + number
        best = max(best, total / steps)
    return best


def measure(correct: np.ndarray, scores: np.ndarray, sources: np.ndarray, threshold: float) -> float:
    """Step-weighted macro-F1 at a threshold."""
    counts = np.zeros((sources.max() + 1, 2, 2))
    np.add.at(counts, (sources, correct * 1, (scores >= threshold) * 1), 1)
    return float(step_weighted_mean(class_f1(counts).mean(-1), counts.sum((-1, -2))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="file for the numbers")
    args = parser.parse_args()
    correct, scores, sources = make_steps()
    lists = [column.tolist() for column in (correct, scores, sources)]
    contestants = {
        "plain Python, 1,000 passes": lambda: python_sweep(*lists),
        "numpy, 1,000 passes": lambda: max(measure(correct, scores, sources, each) for each in THRESHOLDS),
        "best_threshold, one sort": lambda: measure(
            correct, scores, sources, best_threshold(correct, scores, sources)
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    found = {}
    for _ in range(args.repeats):
        for name, run in contestants.items():
            start = time.perf_counter()
            found[name] = run()
            seconds[name].append(time.perf_counter() - start)
    if found["best_threshold, one sort"] < max(found.values()) - 1e-12:
        raise SystemExit(f"a sweep found a better threshold: {found}")
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ours = medians["best_threshold, one sort"]
    rows = [[name, medians[name], medians[name] / ours, 100 * found[name]] for name in contestants]
    print(f"{len(scores):,} steps, {args.repeats} runs each")
    print(tabulate(rows, headers=["", "seconds", "times ours", "best macro-F1"], floatfmt=("", ".4f", ".1f", ".4f")))
    if args.json:
        names = ("python_over_ours", "numpy_over_ours")
        ratios = dict(zip(names, (row[2] for row in rows), strict=False))
        with open(args.json, "w") as file:
            json.dump({"steps": len(scores), **ratios, "macro_f1": found}, file, indent=2)


if __name__ == "__main__":
    main()
