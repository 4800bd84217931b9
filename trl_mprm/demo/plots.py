"""The three pictures of the demo, each in a light and a dark version."""

from pathlib import Path

import numpy as np
from datasets import Dataset
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from trl_mprm import ProcessRewardModel, top_fraction
from trl_mprm.data.images import open_image
from trl_mprm.plotting import SUBSETS, save_light_and_dark

from .inference import interval


NAMES = {"zero-shot": "untrained\nbase", "random10": "random 10%", "bis10": "BIS 10%", "full": "all rollouts",
         "true10": "random 10%,\ntrue labels"}  # fmt: skip
LOOKS = {"zero-shot": "base", "random10": "random", "bis10": "bis", "full": "full", "true10": "true"}


def dots(axes: Axes, x: float, values: list[float], look: dict) -> None:
    """One dot per seed at `x`, and beside them the mean with its 95% interval."""
    f1, color = interval(values), look["color"]
    axes.scatter(np.full(len(values), x) + np.linspace(-0.12, 0.12, len(values)), values, 22, alpha=0.6, lw=0, **look)
    if f1["low"] is not None:
        axes.plot([x + 0.28, x + 0.28], [f1["low"], f1["high"]], color=color, marker="", lw=2)
    axes.plot(x + 0.28, f1["mean"], color=color, marker="_", ms=12, mew=2)
    axes.annotate(f"{f1['mean']:.1f}", (x + 0.28, f1["mean"]), (9, -3), textcoords="offset points", fontsize=9)


def draw_results(results: dict, path: Path) -> None:
    """F1 by subset: one dot per seed, and the mean with its interval."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        subsets = list(results["summary"]["subsets"])
        for x, subset in enumerate(subsets):
            values = [100 * run["macro_f1_step_weighted"] for run in results["runs"] if run["subset"] == subset]
            dots(axes, x, values, SUBSETS[LOOKS.get(subset, "true")])
        axes.set_xticks(range(len(subsets)), [NAMES.get(subset, subset) for subset in subsets])
        axes.set_xlim(-0.5, len(subsets) - 0.2)
        axes.set(ylabel="F1 on the benchmark", title="One dot per seed; lines: mean and 95% interval")

    save_light_and_dark(draw, path)


def draw_corpus(scored: Dataset, fraction: float, path: Path) -> None:
    """Every rollout by the two factors of BIS, mixture and reliability, with those that BIS keeps."""
    columns = scored.select_columns(["bis_p_pos", "bis_reliability"]).with_format("numpy")
    p_pos, reliability = columns["bis_p_pos"][:], columns["bis_reliability"][:]
    kept = np.zeros(len(scored), bool)
    kept[list(top_fraction(scored, fraction, by="source").indices)] = True
    # Most rollouts share a point: spread them a little, or the picture hides how many there are.
    jitter = np.random.default_rng(0).normal(0, 0.008, (2, len(scored)))
    x, y = p_pos + jitter[0], reliability + jitter[1]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for part, color, size, words in ((~kept, "C4", 3, "left out"), (kept, "C0", 5, "kept by BIS")):
            axes.scatter(x[part], y[part], s=size, color=color, marker="o", lw=0, label=f"{words} ({part.sum():,})")
        axes.set(xlabel="share of steps with a good continuation", ylabel="mean score of those steps",
                 title="Rollouts of the corpus: BIS keeps the mixed and reliable ones")  # fmt: skip
        axes.legend(loc="lower left", markerscale=4)

    save_light_and_dark(draw, path, size=(6.4, 4.2))


def draw_solution(prm: ProcessRewardModel, items: list[dict], path: Path) -> None:
    """One picture of the benchmark with a solution that goes wrong halfway; the steps coloured by their score."""
    item = max(items, key=lambda item: min(item["labels"].count(1), item["labels"].count(-1)))
    scores = prm.score(item["images"], item["prompt"], item["completions"])
    colours = LinearSegmentedColormap.from_list("score", ["#e69f00", "#dfe3e8", "#56b4e9"])  # bad, between, good

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.5))
        left.imshow(open_image(item["images"][0]))
        figure.suptitle(item["prompt"])
        for k, (step, score, label) in enumerate(zip(item["completions"], scores, item["labels"], strict=True)):
            y = 1 - (k + 0.5) / len(scores)
            truth = {1: "right", -1: "wrong", 0: "neutral"}[label]
            right.text(0.02, y, step, va="center", color="black", bbox={"facecolor": colours(score), "lw": 0})
            right.text(0.98, y, f"P(good) {score:.3f}   truly {truth}", va="center", ha="right", fontsize=8)
        left.axis("off")
        right.axis("off")

    save_light_and_dark(draw, path, size=(8, 3.4))
