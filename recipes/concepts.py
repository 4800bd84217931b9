"""
Draw the picture of `recipes/concepts.md`: rollouts of the miniature by the two things that BIS looks at.

    python recipes/concepts.py            # writes concepts.png and concepts-dark.png beside this file

Each dot stands for all rollouts with the same share of good steps and the same mean score of the good steps; its area
grows with their number. The colour is the Balanced-Information Score.
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from trl_mprm.demo.settings import DEMO
from trl_mprm.demo.world import make_problems, roll_out
from trl_mprm.plotting import save_light_and_dark
from trl_mprm.selection.bis import ALPHA, balanced_information


# The three rollouts that the page works out by hand.
EXAMPLES = {
    "A": ("all steps good", [1.0, 1.0, 1.0, 1.0, 1.0]),
    "B": ("a clear error", [1.0, 0.9375, 1.0, 0.0, 0.0]),
    "C": ("good by luck", [0.0625, 0.125, 0.0625, 0.0, 0.0]),
}


def corpus(rollouts: int, seed: int = 0) -> list[np.ndarray]:
    """Monte Carlo scores of the steps of `rollouts` rollouts of the miniature, one array per rollout."""
    rng = np.random.default_rng(seed)
    problems = make_problems(rollouts // DEMO.rollouts, DEMO.policy, rng, options=DEMO.options)
    steps = roll_out(problems, np.repeat(np.arange(len(problems)), DEMO.rollouts), DEMO.policy, rng, DEMO.num_mc)
    return [right[kind >= 0] / DEMO.num_mc for right, kind in zip(steps.correct, steps.kind, strict=True)]


def information(rollouts: list) -> dict[str, np.ndarray]:
    """Columns of `balanced_information`, one value per rollout."""
    return balanced_information(np.concatenate(rollouts), np.cumsum([0, *map(len, rollouts)]), alpha=ALPHA)


def draw(figure: Figure, rollouts: list[np.ndarray]) -> None:
    """Rollouts on the plane of the share of good steps and of their mean score, with the three examples."""
    columns, named = information(rollouts), information([scores for _, scores in EXAMPLES.values()])
    points = np.stack([columns["bis_p_pos"], columns["bis_reliability"], columns["bis"]], axis=1)
    points, number = np.unique(points, axis=0, return_counts=True)
    colours = {"cmap": "cividis", "vmin": 0, "vmax": 0.25 + ALPHA}
    axes = figure.subplots()
    share, reliability = np.meshgrid(np.linspace(0, 1, 201), np.linspace(0, 1, 201))
    field = (share * (1 - share) + ALPHA) * reliability
    lines = axes.contour(share, reliability, field, [0.1, 0.2, 0.3, 0.4], colors="C4", linewidths=0.8)
    axes.clabel(lines, fmt="%.1f", fontsize=8, manual=[(0.5, 0.22), (0.5, 0.44), (0.5, 0.67), (0.5, 0.89)])
    x, y, bis = points.T
    dots = axes.scatter(x, y, s=8 * np.sqrt(number), c=bis, edgecolors="C4", linewidths=0.4, **colours)
    for name, px, py, value in zip(EXAMPLES, named["bis_p_pos"], named["bis_reliability"], named["bis"], strict=True):
        axes.scatter(px, py, s=110, marker="D", c=[value], edgecolors="C5", linewidths=2, zorder=3, **colours)
        words = f"{name}: {EXAMPLES[name][0]}, {value:.2f}"
        place = (px + 0.02, 1.06) if py > 0.5 else (px + 0.02, py - 0.08)
        axes.text(*place, words, ha="right", va="center", fontweight="bold")
    axes.set(
        xlim=(-0.04, 1.06),
        ylim=(-0.05, 1.1),
        xlabel="share of steps from which at least one continuation is right (p_pos)",
        ylabel="mean score of those steps (R)",
        title="BIS is high where good and bad steps meet and the good ones are sure",
    )
    figure.colorbar(dots, label=f"BIS, alpha {ALPHA}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder of the pictures")
    parser.add_argument("--rollouts", type=int, default=4000)
    args = parser.parse_args()
    scores = corpus(args.rollouts)
    for path in save_light_and_dark(
        lambda figure: draw(figure, scores), args.output / "concepts.png", size=(7.5, 4.6)
    ):
        print(path)
