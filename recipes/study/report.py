"""
The report of the study: one table and four pictures beside the paper's figures, and what replicates.

    python recipes/study/report.py runs/study      (study.py ends with it)

In, `results.json` of the study; out, `table.md` and the pictures in the same folder. Every difference is paired by seed
(both arms saw the same data), with a 95% interval by Student's t.
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from tabulate import tabulate

from trl_mprm.demo.run import interval
from trl_mprm.evaluation.published_results import TABLES
from trl_mprm.files import atomic_output


matplotlib.use("Agg")  # writes files only; a server has no display
import matplotlib.pyplot as plt  # noqa: E402


F1 = "macro_f1_step_weighted"
BACKBONES = ("InternVL2.5-8B", "Qwen2.5-VL-7B")
PAPER = {row[0]: row[1] for row in TABLES["visualprocessbench"][0].rows}
FRACTIONS = (5, 10, 15, 25, 35, 50)
YLIM = (40, 100)
GREEN, BLUE, RED, GREY, AMBER = "#2a9d55", "#4878a8", "#d1495b", "#8a939c", "#e9a23b"
# Our arm -> the paper's row.
PAPER_ROWS = {
    "zero-shot": "Base",
    "full": "Full Hard 0",
    "full-1/N": "Full Hard 1/N",
    "full-2/N": "Full Hard 2/N",
    "full-soft": "Full Soft",
    **{f"random{percent}": f"Random-{percent}%" for percent in FRACTIONS},
    **{f"bis{percent}": f"BIS-{percent}%" for percent in FRACTIONS},
    "mixed25": "Mixed-25%",
    "reliable25": "Reliable-25%",
    "low_mc25": "Low-MC-25%",
    "bis25-alpha0.02": "BIS-25% alpha 0.02",
}
# What the paper says, as a difference of two arms: (words, arm, other arm, the sign it should have; 0: none).
CLAIMS = (
    ("training on Monte Carlo labels lifts the base", "full", "zero-shot", 1),
    ("BIS-5% beats random-5%", "bis5", "random5", 1),
    ("BIS-10% beats random-10%", "bis10", "random10", 1),
    ("BIS-15% beats random-15%", "bis15", "random15", 1),
    ("BIS-25% beats random-25%", "bis25", "random25", 1),
    ("BIS-35% beats random-35%", "bis35", "random35", 1),
    ("BIS-50% beats random-50%", "bis50", "random50", 1),
    ("BIS-10% is as good as full data", "bis10", "full", 0),
    ("BIS-25% is as good as full data", "bis25", "full", 0),
    ("random-25% falls behind full data", "random25", "full", -1),
    ("mixed-25% beats random-25%", "mixed25", "random25", 1),
    ("low-MC-25% beats random-25%", "low_mc25", "random25", 1),
    ("reliable-25% is behind random-25%", "reliable25", "random25", -1),
    ("BIS-25% beats mixed-25%", "bis25", "mixed25", 1),
    ("BIS-25% beats low-MC-25%", "bis25", "low_mc25", 1),
    ("BIS-25% beats reliable-25%", "bis25", "reliable25", 1),
    ("alpha 0.02 is behind 0.05 at 25%", "bis25-alpha0.02", "bis25", -1),
    ("threshold 1/N is behind 0 on full data", "full-1/N", "full", -1),
    ("threshold 2/N is behind 0 on full data", "full-2/N", "full", -1),
    ("soft labels are behind hard labels on full data", "full-soft", "full", -1),
)
# Ours alone: the paper prints no figure for these.
FURTHER = (
    ("true labels against Monte Carlo labels, the same random 10%", "true10", "random10"),
    ("true labels against Monte Carlo labels, full data", "true-full", "full"),
    ("random-25% for 4 epochs (as many updates as full) against full", "random25x4", "full"),
    ("random-25% for 4 epochs against one", "random25x4", "random25"),
    ("mixed-10% against random-10%", "mixed10", "random10"),
    ("low-MC-10% against random-10%", "low_mc10", "random10"),
    ("reliable-10% against random-10%", "reliable10", "random10"),
    ("BIS-10% against mixed-10%", "bis10", "mixed10"),
    ("BIS-10%: alpha 0.02 against 0.2", "bis10-alpha0.02", "bis10"),
    ("BIS-10%: alpha 0.05 against 0.2", "bis10-alpha0.05", "bis10"),
    ("BIS-10%: alpha 0.1 against 0.2", "bis10-alpha0.1", "bis10"),
    ("BIS-10%: alpha 0.5 against 0.2", "bis10-alpha0.5", "bis10"),
    ("BIS-25%: alpha 0.2 against 0.05", "bis25-alpha0.2", "bis25"),
    ("BIS-10%: ties by hash against first in the file", "bis10-hash", "bis10"),
    ("BIS-25%: ties by hash against first in the file", "bis25-hash", "bis25"),
)


class Study:
    """The runs of a study, by world, arm and seed."""

    def __init__(self, results: dict):
        self.arms = list(results["arms"])
        self.runs = {(run["world"], run["arm"], run["seed"]): run for run in results["runs"]}
        self.worlds = list(dict.fromkeys(run["world"] for run in results["runs"]))

    def by_seed(self, arm: str, world: str = "standard") -> dict[int, dict]:
        return {seed: run for (of, name, seed), run in self.runs.items() if (of, name) == (world, arm)}

    def mean(self, arm: str, name: str = F1, world: str = "standard") -> dict:
        return interval([100 * run[name] for run in self.by_seed(arm, world).values()])

    def difference(self, one: str, other: str, name: str = F1, world: str = "standard") -> dict | None:
        """Mean of `one - other` over the seeds that both have, in points; `None` where they have none."""
        mine, theirs = self.by_seed(one, world), self.by_seed(other, world)
        both = sorted(mine.keys() & theirs.keys())
        return interval([100 * (mine[seed][name] - theirs[seed][name]) for seed in both]) if both else None


def significant(difference: dict) -> int:
    """1 or -1 where the 95% interval leaves out 0, else 0."""
    if difference["low"] is None:
        return 0
    return int(difference["low"] > 0) - int(difference["high"] < 0)


def verdict(difference: dict, expected: int) -> str:
    """Whether our interval bears out a claim; `expected` 0 claims that there is no difference."""
    found = significant(difference)
    if expected == 0:
        return {1: "better than that", -1: "no", 0: "inconclusive"}[found]
    return "yes" if found == expected else "inconclusive" if found == 0 else "the opposite"


def points(difference: dict | None) -> str:
    if difference is None:
        return "not run"
    if difference["low"] is None:
        return f"{difference['mean']:+.1f} (1 seed)"
    return f"{difference['mean']:+.1f} ({difference['low']:+.1f} to {difference['high']:+.1f})"


def paper(arm: str, backbone: str) -> float | None:
    return PAPER.get(f"{backbone} {PAPER_ROWS.get(arm)}")


def paper_difference(one: str, other: str, backbone: str) -> str:
    figures = paper(one, backbone), paper(other, backbone)
    return "" if None in figures else f"{figures[0] - figures[1]:+.2f}"


def arm_table(study: Study) -> list[list]:
    rows = []
    for arm in study.arms:
        runs = list(study.by_seed(arm).values())
        if not runs:
            rows.append([arm, "not run"] + [""] * 9)
            continue
        f1 = study.mean(arm)
        spread = "" if f1["low"] is None else f"{f1['low']:.1f} to {f1['high']:.1f}"
        labels = [f"{100 * np.mean([run[name] for run in runs]):.0f}%" if name in runs[0] else ""
                  for name in ("mixed_rollouts", "wrong_but_positive")]  # fmt: skip
        counts = [f"{np.mean([run[name] for run in runs]):,.0f}" for name in ("rollouts", "optimizer_steps")]
        theirs = ["" if paper(arm, backbone) is None else f"{paper(arm, backbone):.2f}" for backbone in BACKBONES]
        rows.append([arm, len(runs), *counts, *labels, f"{f1['mean']:.1f}", spread,
                     f"{study.mean(arm, 'auc')['mean']:.1f}", *theirs])  # fmt: skip
    return rows


def claim_table(study: Study) -> list[list]:
    rows = []
    for words, one, other, expected in CLAIMS:
        f1, auc = study.difference(one, other), study.difference(one, other, "auc")
        theirs = [paper_difference(one, other, backbone) for backbone in BACKBONES]
        rows.append([words, *theirs, points(f1), points(auc), "not run" if f1 is None else verdict(f1, expected)])
    return rows


def robustness_table(study: Study) -> list[list]:
    return [
        [world, *(f"{study.mean(arm, world=world)['mean']:.1f}" for arm in ("zero-shot", "random10", "bis10")),
         points(study.difference("bis10", "random10", world=world)),
         points(study.difference("bis10", "random10", "auc", world))]
        for world in study.worlds if all(study.by_seed(arm, world) for arm in ("zero-shot", "random10", "bis10"))
    ]  # fmt: skip


def markdown(study: Study) -> str:
    """The report in words and figures."""
    further = [[words, points(study.difference(one, other)), points(study.difference(one, other, "auc"))]
               for words, one, other in FURTHER]  # fmt: skip
    parts = (
        ("## What replicates", claim_table(study),
         ["the paper says", *(f"paper, {backbone}" for backbone in BACKBONES), "ours: F1", "ours: AUC",
          "in miniature"]),
        ("## Further comparisons (no figure in the paper)", further, ["comparison", "F1", "AUC"]),
        ("## Robustness: BIS-10% against random-10% in other worlds", robustness_table(study),
         ["world", "zero-shot", "random10", "bis10", "difference F1", "difference AUC"]),
        ("## Every arm", arm_table(study),
         ["arm", "seeds", "rollouts", "updates", "mixed", "wrong but positive", "F1", "95% interval", "AUC",
          *(f"paper, {backbone}" for backbone in BACKBONES)]),
    )  # fmt: skip
    return "\n\n".join(
        f"{title}\n\n{tabulate(rows, head, tablefmt='pipe', disable_numparse=True)}" for title, rows, head in parts
    )


def bars(axes: plt.Axes, study: Study, arms: list[str], names: list[str], colours: list[str]) -> None:
    """A bar at the mean of each arm, its interval, one dot per seed."""
    for x, (arm, colour) in enumerate(zip(arms, colours, strict=True)):
        runs = study.by_seed(arm)
        if not runs:
            continue
        values, f1 = [100 * run[F1] for run in runs.values()], study.mean(arm)
        axes.bar(x, f1["mean"], color=colour, alpha=0.35)
        if f1["low"] is not None:
            axes.errorbar(x, f1["mean"], f1["high"] - f1["mean"], color=colour, capsize=4)
        axes.scatter(np.full(len(values), x) + np.linspace(-0.15, 0.15, len(values)), values, 12, colour, zorder=3)
    axes.set_xticks(range(len(arms)), names)
    axes.set_xlim(-0.6, len(arms) - 0.4)  # room for what was not run


def paper_bars(axes: plt.Axes, arms: list[str], names: list[str], colours: list[str], backbone: str) -> None:
    values = [paper(arm, backbone) for arm in arms]
    for x, (value, colour) in enumerate(zip(values, colours, strict=True)):
        axes.bar(x, value, color=colour, alpha=0.35)
        axes.text(x, value, f"{value:.1f}", ha="center", va="bottom", fontsize=8)
    axes.set(title=f"paper, {backbone}", ylim=(min(values) - 2, max(values) + 1))
    axes.set_xticks(range(len(arms)), names)


def draw_saturation(study: Study, path: Path) -> None:
    """Figure 1 of the paper: random and BIS by fraction, with full data and the base."""
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    for rule, colour in (("random", BLUE), ("bis", GREEN)):
        name = {"random": "random", "bis": "BIS"}[rule]
        done = [percent for percent in FRACTIONS if study.by_seed(f"{rule}{percent}")]
        means = [study.mean(f"{rule}{percent}") for percent in done]
        panels[0].plot(done, [mean["mean"] for mean in means], "o-", color=colour, label=name)
        edges = [[mean["mean"] if mean[edge] is None else mean[edge] for mean in means] for edge in ("low", "high")]
        panels[0].fill_between(done, *edges, color=colour, alpha=0.15, lw=0)
        for percent in done:
            values = [100 * run[F1] for run in study.by_seed(f"{rule}{percent}").values()]
            panels[0].scatter(np.full(len(values), percent), values, 8, colour, alpha=0.6)
        for panel, backbone in zip(panels[1:], BACKBONES, strict=True):
            figures = [paper(f"{rule}{percent}", backbone) for percent in FRACTIONS]
            panel.plot(FRACTIONS, figures, "o-", color=colour, label=name)
    for arm, style, colour, name in (("full", "--", "black", "full data"), ("zero-shot", ":", GREY, "base")):
        level(panels[0], study, arm, ls=style, color=colour, label=name)
        for panel, backbone in zip(panels[1:], BACKBONES, strict=True):
            panel.axhline(paper(arm, backbone), ls=style, color=colour, label=name)
    panels[0].set(title="ours: mean, 95% interval, seeds", ylabel="step-weighted macro-F1", ylim=YLIM)
    for panel, backbone in zip(panels[1:], BACKBONES, strict=True):
        panel.set_title(f"paper, {backbone} (one run)")
    for panel in panels:
        panel.set(xlabel="% of the rollouts kept", xticks=FRACTIONS)
    panels[0].legend(fontsize=8, ncols=2, loc="lower right")
    save(figure, path)


def draw_rules(study: Study, path: Path) -> None:
    """Table 4 of the paper: the rules at 25%, and at 10% where it has none."""
    rules = ("random", "low_mc", "mixed", "reliable", "bis")
    names, colours = ["random", "low-MC", "mixed", "reliable", "BIS"], [BLUE, AMBER, RED, GREY, GREEN]
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for panel, percent in zip(panels, (10, 25), strict=False):
        bars(panel, study, [f"{rule}{percent}" for rule in rules], names, colours)
        level(panel, study, "full", ls="--", color="black", lw=1)
        panel.set(title=f"ours at {percent}% (dashed: full data)", ylim=YLIM)
    panels[0].set_ylabel("step-weighted macro-F1")
    paper_bars(panels[2], [f"{rule}25" for rule in rules], names, colours, BACKBONES[0])
    panels[2].axhline(paper("full", BACKBONES[0]), ls="--", color="black", lw=1)
    save(figure, path)


def draw_labels(study: Study, path: Path) -> None:
    """Tables 2 and 5 of the paper: thresholds and soft labels on full data, alpha, ties."""
    figure, panels = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained", width_ratios=(1.1, 1, 1.4, 0.8))
    arms, names = ["full", "full-1/N", "full-2/N", "full-soft", "true-full"], ["> 0", "> 1/N", "> 2/N", "soft", "true"]
    colours = [BLUE, BLUE, BLUE, AMBER, GREY]
    bars(panels[0], study, arms, names, colours)
    panels[0].set(title="ours: labels of the full data", ylabel="step-weighted macro-F1", ylim=YLIM)
    paper_bars(panels[1], arms[:4], names[:4], colours[:4], BACKBONES[0])
    alphas = {"0.02": "bis10-alpha0.02", "0.05": "bis10-alpha0.05", "0.1": "bis10-alpha0.1", "0.2": "bis10",
              "0.5": "bis10-alpha0.5", "hash": "bis10-hash"}  # fmt: skip
    wide = {
        "25%\n0.02": "bis25-alpha0.02",
        "25%\n0.05": "bis25",
        "25%\n0.2": "bis25-alpha0.2",
        "25%\nhash": "bis25-hash",
    }
    both = alphas | wide
    bars(panels[2], study, list(both.values()), list(both), [GREEN] * len(alphas) + [GREY] * len(wide))
    panels[2].set(title="ours: BIS-10%, BIS-25% by alpha; ties by hash", ylim=YLIM)
    panels[2].tick_params(axis="x", labelsize=7)
    for x, (alpha, row) in enumerate({"0.02": " alpha 0.02", "0.05": "", "0.08": " alpha 0.08"}.items()):
        value = PAPER[f"InternVL2.5-8B BIS-25%{row}"]
        panels[3].bar(x, value, color=GREEN, alpha=0.35)
        panels[3].text(x, value, f"{value:.1f}", ha="center", va="bottom", fontsize=8)
        panels[3].set_xticks(range(x + 1), [*(label.get_text() for label in panels[3].get_xticklabels()[:x]), alpha])
    panels[3].set(title="paper: BIS-25% by alpha", ylim=(64, 66))
    save(figure, path)


def draw_robustness(study: Study, path: Path) -> None:
    """BIS-10% minus random-10% in every world; and, after Figure 2b of the paper, one pass against matched updates."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    shown = [world for world in study.worlds if study.difference("bis10", "random10", world=world)]
    for y, world in enumerate(reversed(shown)):
        difference = study.difference("bis10", "random10", world=world)
        mine, theirs = study.by_seed("bis10", world), study.by_seed("random10", world)
        dots = [100 * (mine[seed][F1] - theirs[seed][F1]) for seed in mine.keys() & theirs.keys()]
        left.scatter(dots, np.full(len(dots), y + 0.2), 10, GREEN, alpha=0.6)
        left.plot(difference["mean"], y, "s", color=GREEN)
        if difference["low"] is not None:
            left.plot([difference["low"], difference["high"]], [y, y], color=GREEN)
    left.axvline(0, color="black", lw=1)
    left.set_yticks(range(len(shown)), list(reversed(shown)))
    left.set_ylim(-0.6, len(shown) - 0.2)
    left.set(title="BIS-10% minus random-10% (mean, 95% interval, seeds)", xlabel="points of F1")
    arms = ["random25", "random25x4", "full", "bis25"]
    bars(right, study, arms, ["random 25%\n1 epoch", "random 25%\n4 epochs", "full\n1 epoch", "BIS 25%\n1 epoch"],
         [BLUE, BLUE, GREY, GREEN])  # fmt: skip
    right.set(title="one pass and matched updates", ylabel="step-weighted macro-F1", ylim=YLIM)
    save(figure, path)


def level(axes: plt.Axes, study: Study, arm: str, **style: Any) -> None:
    """A line across at the mean of an arm, where it was run."""
    if study.by_seed(arm):
        axes.axhline(study.mean(arm)["mean"], **style)


def save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write_report(folder: Path) -> None:
    """Write `table.md` and the four pictures beside `results.json`."""
    study = Study(json.loads((folder / "results.json").read_text(encoding="utf-8")))
    text = markdown(study)
    with atomic_output(folder / "table.md") as part:
        part.write_text(text + "\n", encoding="utf-8")
    draw_saturation(study, folder / "saturation.png")
    draw_rules(study, folder / "rules.png")
    draw_labels(study, folder / "labels.png")
    draw_robustness(study, folder / "robustness.png")
    print(text)
    print(f"\nWrote {folder}/: results.json, table.md, saturation.png, rules.png, labels.png, robustness.png")


if __name__ == "__main__":
    write_report(Path(sys.argv[1]))
