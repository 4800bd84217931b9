"""The three pictures of the demo."""

from pathlib import Path

import matplotlib
import numpy as np
from datasets import Dataset
from PIL import Image

from trl_mprm import ProcessRewardModel, top_fraction


matplotlib.use("Agg")  # writes files only; a server has no display
import matplotlib.pyplot as plt  # noqa: E402


GOOD, BAD, DULL = "#2a9d55", "#d1495b", "#b8c0c8"


def draw_results(results: dict, path: Path) -> None:
    """F1 by subset: one dot per seed, a bar at the mean."""
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    subsets = list(results["summary"]["subsets"])
    for x, subset in enumerate(subsets):
        values = [100 * run["macro_f1_step_weighted"] for run in results["runs"] if run["subset"] == subset]
        colour = GOOD if subset == "bis10" else "#4878a8"
        axes.bar(x, np.mean(values), color=colour, alpha=0.3)
        axes.scatter(np.full(len(values), x) + np.linspace(-0.1, 0.1, len(values)), values, color=colour, zorder=3)
    lowest = min(100 * run["macro_f1_step_weighted"] for run in results["runs"])
    axes.set(ylim=(lowest - 5, None), ylabel="step-weighted macro-F1", title="one dot per seed, bar = mean")
    axes.set_xticks(range(len(subsets)), subsets)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_corpus(scored: Dataset, fraction: float, path: Path) -> None:
    """Every rollout by the two factors of BIS, mixture and reliability, with those that BIS keeps."""
    columns = scored.select_columns(["bis_p_pos", "bis_reliability"]).with_format("numpy")
    p_pos, reliability = columns["bis_p_pos"][:], columns["bis_reliability"][:]
    kept = np.zeros(len(scored), bool)
    kept[list(top_fraction(scored, fraction, by="source").indices)] = True
    # Most rollouts share a point: spread them a little, or the picture hides how many there are.
    jitter = np.random.default_rng(0).normal(0, 0.008, (2, len(scored)))
    x, y = p_pos * (1 - p_pos) + jitter[0], reliability + jitter[1]
    figure, axes = plt.subplots(figsize=(6, 4.2), layout="constrained")
    axes.scatter(x[~kept], y[~kept], s=3, color=DULL, label=f"left out ({(~kept).sum():,})")
    axes.scatter(x[kept], y[kept], s=3, color=GOOD, label=f"kept by BIS ({kept.sum():,})")
    axes.set(xlabel="mixture  p(1 - p)", ylabel="reliability  R", title="rollouts of the corpus")
    axes.legend(loc="lower left", markerscale=4)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_solution(prm: ProcessRewardModel, items: list[dict], path: Path) -> None:
    """One picture of the benchmark with a solution that goes wrong halfway; the steps coloured by their score."""
    item = max(items, key=lambda item: min(item["labels"].count(1), item["labels"].count(-1)))
    scores = prm.score(item["images"], item["prompt"], item["completions"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), width_ratios=(1, 1.5), layout="constrained")
    left.imshow(Image.open(item["images"][0]))
    figure.suptitle(item["prompt"])
    colours = matplotlib.colors.LinearSegmentedColormap.from_list("score", [BAD, "#e9c46a", GOOD])
    for k, (step, score, label) in enumerate(zip(item["completions"], scores, item["labels"], strict=True)):
        y = 1 - (k + 0.5) / len(scores)
        truth = {1: "right", -1: "wrong", 0: "neutral"}[label]
        right.text(0.02, y, step, va="center", bbox={"facecolor": colours(score), "alpha": 0.6, "lw": 0})
        right.text(0.98, y, f"P(good) {score:.2f}   truly {truth}", va="center", ha="right", fontsize=8)
    left.axis("off")
    right.axis("off")
    figure.savefig(path, dpi=150)
    plt.close(figure)
