"""
The report of the study: the answers to the questions of both plans, every arm, and three pictures beside the paper's figures.

    python recipes/study/report.py runs/study      (study.py ends with it)

In, `results.json` of the study; out, `table.md` and the pictures in the same folder. Every difference is paired by seed
(both arms saw the same data), with a 95% interval by Student's t.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tabulate import tabulate

from trl_mprm.demo.inference import holm, interval, p_above, p_equivalent
from trl_mprm.demo.plots import dots
from trl_mprm.demo.run import F1, MARGIN
from trl_mprm.evaluation.published_results import TABLES
from trl_mprm.files import atomic_output
from trl_mprm.plotting import SUBSETS, save_light_and_dark


BACKBONES = ("InternVL2.5-8B", "Qwen2.5-VL-7B")
PAPER = {row[0]: row[1] for row in TABLES["visualprocessbench"][0].rows}
# Our arm -> the paper's row.
PAPER_ROWS = {
    "zero-shot": "Base",
    "full": "Full Hard 0",
    "full-1/N": "Full Hard 1/N",
    "full-soft": "Full Soft",
    **{f"random{percent}": f"Random-{percent}%" for percent in (10, 25, 50)},
    **{f"bis{percent}": f"BIS-{percent}%" for percent in (10, 25, 50)},
    "mixed25": "Mixed-25%",
    "reliable25": "Reliable-25%",
    "low_mc25": "Low-MC-25%",
}
ABOVE, BELOW, DIFFERENT, EQUAL, NOT_BEHIND = "above", "below", "different", "equal", "not behind"
NON_INFERIORITY = 3.0
ASTRAY = 80  # F1 below which a training is said to have gone astray
DEMO_RESULTS = Path(__file__).parents[1] / "demo" / "results.json"


@dataclass(frozen=True)
class Claim:
    """`one` against `other`: above, below, different (no direction), equal within 2 points, or not 3 points behind."""

    words: str
    one: str
    other: str
    kind: str = ABOVE
    world: str = "standard"


PRIMARY = (
    Claim("BIS-10% is better than a random 10%", "bis10", "random10"),
    Claim("BIS-10% is as good as all rollouts", "bis10", "full", EQUAL),
)
SECONDARY = (
    Claim("training on Monte Carlo labels lifts the base", "full", "zero-shot"),
    Claim("true labels are better, all rollouts", "true-full", "full"),
    Claim("true labels are better, the same random 10%", "true10", "random10"),
    Claim("BIS-25% beats random-25%", "bis25", "random25"),
    Claim("BIS-25% is as good as all rollouts", "bis25", "full", EQUAL),
    Claim("random-25% is as good as all rollouts", "random25", "full", EQUAL),
    Claim("random-50% is as good as all rollouts", "random50", "full", EQUAL),
    *(Claim(f"BIS-10% beats {name}-10%", "bis10", f"{rule}10") for rule, name in (
        ("mixed", "mixed"), ("reliable", "reliable"), ("low_mc", "low-MC"), ("self_confidence", "self-confidence"))),
    *(Claim(f"BIS-25% beats {name}-25%", "bis25", f"{rule}25") for rule, name in (
        ("mixed", "mixed"), ("reliable", "reliable"), ("low_mc", "low-MC"))),
    Claim("soft labels are behind hard labels, all rollouts", "full-soft", "full", BELOW),
    Claim("threshold 1/N is behind 0, all rollouts", "full-1/N", "full", BELOW),
    Claim("QLoRA is not 3 points behind all weights, BIS-10%", "bis10", "bis10-all-weights", NOT_BEHIND),
    Claim("QLoRA is not 3 points behind all weights, random 10%", "random10", "random10-all-weights", NOT_BEHIND),
    Claim("QLoRA is not 3 points behind all weights, all rollouts", "full", "full-all-weights", NOT_BEHIND),
    Claim("BIS-10% beats random-10%, no guessable answers", "bis10", "random10", world="lighter noise"),
    Claim("BIS-10% beats random-10%, more guessable answers", "bis10", "random10", world="heavier noise"),
    Claim("BIS-10% beats a class-weighted random 10%", "bis10", "random10-weighted"),
    Claim("BIS-10% beats a random 10% that is as mixed", "bis10", "random10-mixed"),
    Claim("ties by hash differ from the first in the file", "bis10-hash", "bis10", DIFFERENT),
    Claim("no answer step differs", "bis10-no-answer", "bis10", DIFFERENT),
    Claim("alpha 0.05 differs from 0.2", "bis10-alpha0.05", "bis10", DIFFERENT),
    Claim("alpha 0.5 differs from 0.2", "bis10-alpha0.5", "bis10", DIFFERENT),
)  # fmt: skip

EXPLORATORY = (
    Claim("three epochs each: BIS-10% beats random-10%", "bis10-3-epochs", "random10-3-epochs"),
    Claim("three epochs differ from one, random 10%", "random10-3-epochs", "random10", DIFFERENT),
    Claim("three epochs differ from one, BIS-10%", "bis10-3-epochs", "bis10", DIFFERENT),
    Claim("BIS-10% for three epochs is as good as all rollouts", "bis10-3-epochs", "full", EQUAL),
)
REPLICATION = tuple(
    Claim(words, f"bis10{epochs}", other, kind, "replication")
    for words, epochs, other, kind in (
        ("new seeds, three epochs: BIS-10% beats random-10%", "-3-epochs", "random10-3-epochs", ABOVE),
        ("new seeds, three epochs: BIS-10% is as good as all", "-3-epochs", "full", EQUAL),
        ("new seeds, one epoch: BIS-10% beats random-10%", "", "random10", ABOVE),
        ("new seeds, one epoch: BIS-10% is as good as all", "", "full", EQUAL),
    )
)
REPLICATION_SEEDS = 12
FAMILIES = (PRIMARY, REPLICATION, SECONDARY, EXPLORATORY)


class Study:
    """The runs of a study, by world, arm and seed."""

    def __init__(self, results: dict):
        self.arms = list(results["arms"])
        self.runs = {(run["world"], run["arm"], run["seed"]): run for run in results["runs"]}

    def by_seed(self, arm: str, world: str = "standard") -> dict[int, dict]:
        return {seed: run for (of, name, seed), run in self.runs.items() if (of, name) == (world, arm)}

    def values(self, arm: str, name: str = F1, world: str = "standard") -> list[float]:
        return [100 * run[name] for run in self.by_seed(arm, world).values()]

    def differences(self, claim: Claim, name: str = F1) -> list[float]:
        """`one - other` in points, for each seed that both have."""
        mine, theirs = self.by_seed(claim.one, claim.world), self.by_seed(claim.other, claim.world)
        return [100 * (mine[seed][name] - theirs[seed][name]) for seed in sorted(mine.keys() & theirs.keys())]


def p_value(claim: Claim, differences: list[float]) -> float:
    """Two-sided where a difference is claimed; one-sided against the margin where there is one."""
    if claim.kind == EQUAL:
        return p_equivalent(differences, MARGIN)
    if claim.kind == NOT_BEHIND:
        return p_above(differences, -NON_INFERIORITY)
    above = p_above(differences)
    return 2 * min(above, 1 - above)


def outcome(claim: Claim, differences: list[float], p: float) -> str:
    """What a claim comes to at the 5% level, given its p-value, corrected or not."""
    if p >= 0.05:
        return "not shown"
    upwards = float(np.mean(differences)) > 0
    wrong_way = claim.kind in (ABOVE, BELOW) and upwards != (claim.kind == ABOVE)
    return "the opposite" if wrong_way else "yes"


def points(differences: list[float]) -> str:
    if not differences:
        return "not run"
    found = interval(differences)
    if found["low"] is None:
        return f"{found['mean']:+.1f} (1 seed)"
    return f"{found['mean']:+.1f} ({found['low']:+.1f} to {found['high']:+.1f})"


def paper(arm: str, backbone: str) -> float | None:
    return PAPER.get(f"{backbone} {PAPER_ROWS.get(arm)}")


def paper_difference(claim: Claim, backbone: str) -> float | None:
    figures = paper(claim.one, backbone), paper(claim.other, backbone)
    return None if None in figures or claim.world != "standard" else figures[0] - figures[1]


def answers(study: Study) -> dict[Claim, tuple[list[float], float | None, str]]:
    """Claim -> differences, p-value (corrected but for the primary ones; `None`: fewer than two seeds), what it comes to."""
    found: dict[Claim, tuple[list[float], float | None, str]] = {}
    raw = {claim: study.differences(claim) for family in FAMILIES for claim in family}
    run = {claim: p_value(claim, raw[claim]) for claim in raw if len(raw[claim]) > 1}
    corrected = {claim.words: run[claim] for claim in PRIMARY if claim in run}
    largest = 0.0  # of a fixed sequence: what comes after a claim that is not shown is not shown
    for claim in REPLICATION:
        if claim in run:
            corrected[claim.words] = largest = max(largest, run[claim])
            if outcome(claim, raw[claim], largest) == "the opposite":
                largest = 1.0
    for family in (SECONDARY, EXPLORATORY):
        corrected |= holm({claim.words: run[claim] for claim in family if claim in run})
    for claim, differences in raw.items():
        p = corrected.get(claim.words)
        found[claim] = differences, p, "not run" if p is None else outcome(claim, differences, p)
    if any(found[claim][1] is not None and len(raw[claim]) < REPLICATION_SEEDS for claim in REPLICATION):
        found |= {claim: (*found[claim][:2], "not complete") for claim in REPLICATION}
    return found


def claim_rows(study: Study, claims: tuple[Claim, ...]) -> list[list]:
    rows, found = [], answers(study)
    for claim in claims:
        differences, p, words = found[claim]
        theirs = [paper_difference(claim, backbone) for backbone in BACKBONES]
        rows.append([claim.words, *("" if value is None else f"{value:+.2f}" for value in theirs), len(differences),
                     points(differences), points(study.differences(claim, "auc")),
                     "" if p is None else f"{p:.4f}" if p >= 0.0001 else "<0.0001", words])  # fmt: skip
    return rows


def arm_rows(study: Study) -> list[list]:
    rows = []
    for arm in study.arms:
        runs = list(study.by_seed(arm).values())
        if not runs:
            rows.append([arm, "not run"] + [""] * 9)
            continue
        f1 = interval(study.values(arm))
        spread = "" if f1["low"] is None else f"{f1['low']:.1f} to {f1['high']:.1f}"
        shares = [f"{100 * np.mean([run[name] for run in runs]):.0f}%" if name in runs[0] else ""
                  for name in ("mixed_rollouts", "error_steps", "wrong_but_positive")]  # fmt: skip
        theirs = ["" if (value := paper(arm, backbone)) is None else f"{value:.2f}" for backbone in BACKBONES]
        rows.append([arm, len(runs), f"{np.mean([run['rollouts'] for run in runs]):,.0f}", *shares,
                     f"{f1['mean']:.1f}", spread, f"{np.mean(study.values(arm, 'auc')):.1f}", *theirs])  # fmt: skip
    return rows


def steadiness_rows(study: Study) -> list[list]:
    """How far apart the seeds of one arm lie, alone and against all rollouts, and how many trainings went astray."""
    rows = []
    for world in ("standard", "replication"):
        for arm in ("full", "random10", "bis10", "random10-3-epochs", "bis10-3-epochs"):
            values = study.values(arm, world=world)
            behind = study.differences(Claim("", "full", arm, world=world))
            if len(values) > 1:
                seeds = sorted(study.by_seed(arm, world))
                rows.append([arm, f"{seeds[0]} to {seeds[-1]}", f"{np.mean(values):.1f}", f"{np.std(values, ddof=1):.1f}",
                             "" if arm == "full" or len(behind) < 2 else f"{np.std(behind, ddof=1):.1f}", f"{min(values):.1f}",
                             sum(value < ASTRAY for value in values)])  # fmt: skip
    return rows


def pooled_rows(study: Study) -> list[list]:
    """Differences over all seeds that were trained with equal settings, those of the demo among them."""
    demo = Study({"arms": [], "runs": [run | {"world": "standard", "arm": run["subset"]}
                                       for run in json.loads(DEMO_RESULTS.read_text(encoding="utf-8"))["runs"]]})  # fmt: skip
    rows = []
    for claim in REPLICATION:
        earlier = replace(claim, world="standard")
        both, of_demo = study.differences(earlier) + study.differences(claim), demo.differences(earlier)
        row = [f"{claim.one} - {claim.other}", len(both), points(both)]
        rows.append(row + ([len(both + of_demo), points(both + of_demo)] if of_demo else ["", ""]))
    return rows


def markdown(study: Study) -> str:
    """The report in words and figures."""
    head = ["claim", *(f"paper, {backbone}" for backbone in BACKBONES), "seeds", "ours: F1", "ours: AUC", "p"]
    parts = (
        ("## Primary questions", claim_rows(study, PRIMARY), [*head, "answer"]),
        ("## Replication on new seeds, in a fixed sequence (p: the largest so far)", claim_rows(study, REPLICATION), [*head, "answer"]),
        ("## Secondary claims and controls, p with Holm's correction", claim_rows(study, SECONDARY), [*head, "answer"]),
        ("## Exploratory, added when the answers above were known, p with Holm's correction among these",
         claim_rows(study, EXPLORATORY), [*head, "answer"]),
        ("## Every arm", arm_rows(study),
         ["arm", "seeds", "rollouts", "mixed", "negative steps", "wrong but positive", "F1", "95% interval", "AUC",
          *(f"paper, {backbone}" for backbone in BACKBONES)]),
    )  # fmt: skip
    if study.values("full", world="replication"):
        parts += (
            ("## Steadiness, F1 between seeds", steadiness_rows(study),
             ["arm", "seeds", "mean", "SD", "SD of (full - arm)", "lowest", f"below {ASTRAY}"]),
            ("## Pooled over seeds with equal settings, no test", pooled_rows(study),
             ["difference", "seeds", "501 to 512 and 601 to 612", "seeds", "and the demo's"]),
        )  # fmt: skip
    return "\n\n".join(
        f"{title}\n\n{tabulate(rows, columns, tablefmt='pipe', disable_numparse=True)}"
        for title, rows, columns in parts
    )


def spread(axes: Axes, y: float, differences: list[float], color: str) -> None:
    """One dot per seed, and below them the mean with its 95% interval."""
    found = interval(differences)
    axes.scatter(differences, np.full(len(differences), y + 0.22), 12, color=color, alpha=0.6, lw=0, marker="o")
    if found["low"] is not None:
        axes.plot([found["low"], found["high"]], [y, y], color=color, marker="", lw=2)
    axes.plot(found["mean"], y, color=color, marker="s", ms=5)


def label(claim: Claim) -> str:
    """What a difference is of, on two short lines."""
    seeds = "new seeds" if claim.world == "replication" else "seeds of the plan"
    epochs = "three epochs" if "epochs" in claim.one else "one epoch"
    return f"BIS 10% minus {'all' if claim.other == 'full' else 'random 10%'}\n{seeds}, {epochs}"


def draw_primary(study: Study, path: Path) -> None:
    """F1 of the primary arms, and the differences that the primary questions and their replication are about."""
    arms = {"zero-shot": ("untrained\nbase", "base"), "random10": ("random\n10%", "random"), "bis10": ("BIS\n10%", "bis"),
            "full": ("all\nrollouts", "full"), "true-full": ("all, true\nlabels", "true")}  # fmt: skip
    found = answers(study)

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
        shown = [arm for arm in arms if study.by_seed(arm)]
        for x, arm in enumerate(shown):
            dots(left, x, study.values(arm), SUBSETS[arms[arm][1]])
        left.set_xticks(range(len(shown)), [arms[arm][0] for arm in shown])
        left.set_xlim(-0.5, len(shown) - 0.1)
        left.set(ylabel="F1 on the benchmark", title="Seeds of the plan, one epoch: mean, 95% interval")
        right.axvspan(-MARGIN, MARGIN, color="C4", alpha=0.25, lw=0)
        right.axvline(0, color="C4", lw=1, marker="")
        claims = [claim for claim in (*REPLICATION[::-1], *PRIMARY[::-1]) if study.differences(claim)]
        for y, claim in enumerate(claims):
            spread(right, y, study.differences(claim), "C0" if found[claim][2] == "yes" else "C4")
        right.set_yticks(range(len(claims)), [label(claim) for claim in claims], fontsize=8)
        right.set_ylim(-0.5, len(claims) - 0.3)
        right.set(xlabel="points of F1 (band: within 2 points)", title="Differences by seed (grey: not shown)")

    save_light_and_dark(draw, path, size=(10, 3.8))


def draw_claims(study: Study, path: Path) -> None:
    """Every claim: our differences with intervals, and the paper's on a scale of their own."""
    found = answers(study)
    shown = [claim for family in FAMILIES for claim in family if found[claim][2] != "not run"]

    def draw(figure: Figure) -> None:
        ours, theirs = figure.subplots(1, 2, width_ratios=(2, 1), sharey=True)
        for y, claim in enumerate(reversed(shown)):
            spread(ours, y, study.differences(claim), "C4" if found[claim][2] == "not shown" else "C0")
            for backbone, color, marker in zip(BACKBONES, ("C1", "C5"), ("D", "^"), strict=True):
                if (value := paper_difference(claim, backbone)) is not None:
                    theirs.scatter(value, y, 22, color=color, marker=marker, lw=0)
        labels = [f"{claim.words} [{found[claim][2]}]" for claim in reversed(shown)]
        ours.set_yticks(range(len(shown)), labels, fontsize=8)
        for axes in (ours, theirs):
            axes.axvline(0, color="C4", lw=1, marker="")
        ours.set(title="Ours, in miniature (grey: not shown)", xlabel="points of F1, our benchmark")
        theirs.set(title="The paper (one run each)", xlabel="points of F1, VisualProcessBench")
        for backbone, color, marker in zip(BACKBONES, ("C1", "C5"), ("D", "^"), strict=True):
            theirs.scatter([], [], 22, color=color, marker=marker, label=backbone)
        theirs.legend(fontsize=7, loc="lower right")

    save_light_and_dark(draw, path, size=(11, 0.3 * len(shown) + 1.2))


def draw_fractions(study: Study, path: Path) -> None:
    """F1 by the share of the rollouts that is kept, after Figure 1 of the paper."""

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, 3)
        for rule, name in (("random", "random"), ("bis", "BIS")):
            done = {
                percent: study.values(f"{rule}{percent}")
                for percent in (10, 25, 50)
                if study.by_seed(f"{rule}{percent}")
            }
            done |= {100: study.values("full")} if rule == "random" and study.by_seed("full") else {}
            look = SUBSETS[rule]
            panels[0].plot(list(done), [np.mean(values) for values in done.values()], label=name, **look)
            for percent, values in done.items():
                found = interval(values)
                if found["low"] is not None:
                    panels[0].plot([percent] * 2, [found["low"], found["high"]], color=look["color"], marker="", lw=2)
            for panel, backbone in zip(panels[1:], BACKBONES, strict=True):
                theirs = {percent: paper(f"{rule}{percent}", backbone) for percent in (10, 25, 50)}
                theirs |= {100: paper("full", backbone)} if rule == "random" else {}
                panel.plot(list(theirs), list(theirs.values()), label=name, **look)
        panels[0].set(title="Ours: mean and 95% interval", ylabel="F1, our benchmark")
        for panel, backbone in zip(panels[1:], BACKBONES, strict=True):
            panel.set(title=f"The paper, {backbone}\n(one run, a scale of its own)", ylabel="F1, VisualProcessBench")
        for panel in panels:
            panel.set(xlabel="% of the rollouts kept", xticks=(10, 25, 50, 100))
        panels[0].legend(fontsize=8, loc="lower right")

    save_light_and_dark(draw, path, size=(11, 3.6))


def write_report(folder: Path) -> None:
    """Write `table.md` and the pictures beside `results.json`."""
    study = Study(json.loads((folder / "results.json").read_text(encoding="utf-8")))
    text = markdown(study)
    with atomic_output(folder / "table.md") as part:
        part.write_text(text + "\n", encoding="utf-8")
    pictures = {"primary.png": draw_primary, "claims.png": draw_claims, "fractions.png": draw_fractions}
    for name, draw in pictures.items():
        draw(study, folder / name)
    print(text)
    print(f"\nWrote {folder}/: results.json, table.md, {', '.join(pictures)} (and a dark version of each picture)")


if __name__ == "__main__":
    write_report(Path(sys.argv[1]))
