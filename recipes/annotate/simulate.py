"""
How many draws does a selection by BIS need? Compares the race of `trl-mprm annotate --budget bis` with other ways.

    python recipes/annotate/simulate.py --rollouts 4000 --output recipes/annotate

Two corpora whose draws are all known, so that what a way would have drawn can be replayed: rollouts made to have the
figures of the paper's Table 1 (7.7% mixed, mean score .857), and those of the miniature world. Writes `results.json`
and `draws.png`, also for dark ground; with `--draw` only the figure, from the `results.json` that lies there.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from trl_mprm.annotation.budget import Race, Tally, final_bis, next_draws
from trl_mprm.demo.settings import DEMO
from trl_mprm.demo.world import make_problems, roll_out
from trl_mprm.files import write_json
from trl_mprm.plotting import save_light_and_dark


N = 16
CUTS = ((0.10, 0.2), (0.25, 0.05))  # fraction and alpha, as the paper pairs them

# The ways, and what each looks like in the figure.
LOOKS = {
    "race, exact": {"color": "C0", "marker": "o"},
    "race, confident": {"color": "C2", "marker": "^"},
    "fixed smaller N": {"color": "C1", "marker": "s"},
    "until the first right draw": {"color": "C3", "marker": "D"},
    "binary search": {"color": "C4", "marker": "v"},
}


def paper_like(n: int, seed: int) -> list[np.ndarray]:
    """Draws of `n` rollouts, `(steps, N)` bool: 7.7% mixed, mean score .857, some 5.6 steps, about a fifth flawless."""
    rng, corpus = np.random.default_rng(seed), []
    for _ in range(n):
        steps = int(np.clip(rng.poisson(4.6) + 1, 2, 12))
        chance = np.full(steps, 1.0 if rng.random() < 0.13 else rng.beta(7.1, 1.0))
        chance = np.clip(chance + rng.normal(0, 0.03, steps) * (chance < 1), 0, 1)
        if rng.random() < 0.0795:  # goes wrong at some step, and hardly ever recovers
            chance[rng.integers(1, steps) :] = rng.choice([0.0, 0.02])
        corpus.append(rng.random((steps, N)) < chance[:, None])
    return corpus


def miniature(n: int, seed: int) -> list[np.ndarray]:
    """The same of the miniature world; its draws are counted there, and stand here in random order."""
    rng = np.random.default_rng(seed)
    problems = make_problems(n // 4, DEMO.policy, rng, options=DEMO.options, wrong_reference=DEMO.wrong_reference)
    steps = roll_out(problems, np.repeat(np.arange(n // 4), 4), DEMO.policy, rng, N)
    return [
        np.stack([rng.permutation(np.arange(N) < right) for right in correct[kind >= 0]])
        for correct, kind in zip(steps.correct, steps.kind, strict=True)
    ]


def figures(corpus: list[np.ndarray]) -> dict[str, float]:
    scores = [draws.mean(1) for draws in corpus]
    every = np.concatenate(scores)
    return {
        "rollouts": len(corpus),
        "steps_per_rollout": len(every) / len(corpus),
        "mixed_rollouts": float(np.mean([(s > 0).any() and (s == 0).any() for s in scores])),
        "flawless_rollouts": float(np.mean([(s == 1).all() for s in scores])),
        "error_steps": float((every == 0).mean()),
        "mean_score": float(every.mean()),
    }


def top(tallies: list[Tally], fraction: float, alpha: float) -> set[int]:
    order = sorted(range(len(tallies)), key=lambda index: (-final_bis(tallies[index], alpha), index))
    return set(order[: max(1, int(len(tallies) * fraction))])


def share(tallies: list[Tally], corpus: list[np.ndarray]) -> float:
    return sum(sum(tally.asked) for tally in tallies) / sum(draws.size for draws in corpus)


# ---- the ways: a corpus in, the kept rollouts and the share of draws out


def race(corpus: list[np.ndarray], fraction: float, alpha: float, error: float) -> tuple[set[int], float]:
    tallies = [Tally.new(len(draws), N) for draws in corpus]
    run = Race(tallies, fraction, alpha, error)
    while batch := run.take(max(1, min(64, run.quota // 8))):
        for index in batch:
            for step, count in next_draws(tallies[index]):
                start = tallies[index].asked[step]
                tallies[index].add(step, corpus[index][step, start : start + count].tolist())
            run.put_back(index)
    return set(run.kept()), share(tallies, corpus)


def fewer(corpus: list[np.ndarray], fraction: float, alpha: float, n: int) -> tuple[set[int], float]:
    """Draw every step `n` times."""
    tallies = [Tally(n, d[:, :n].sum(1).tolist(), [n] * len(d), [n] * len(d)) for d in corpus]
    return top(tallies, fraction, alpha), share(tallies, corpus)


def until_right(corpus: list[np.ndarray], fraction: float, alpha: float, more: int) -> tuple[set[int], float]:
    """Draw every step until its first right draw, which decides its label, and `more` times from there."""
    tallies = []
    for draws in corpus:
        tally = Tally.new(len(draws), N)
        for step, outcomes in enumerate(draws):
            stop = int(outcomes.argmax()) + 1 + more if outcomes.any() else N
            tally.add(step, outcomes[:stop].tolist())
        tallies.append(tally)
    return top(tallies, fraction, alpha), share(tallies, corpus)


def binary_search(corpus: list[np.ndarray], fraction: float, alpha: float, n: int) -> tuple[set[int], float]:
    """Find the first step without a right draw by bisection, `n` draws per look; other steps take their side's score."""
    tallies, spent = [], 0
    for draws in corpus:
        low, high, seen = 0, len(draws), {}
        while low < high:
            middle = (low + high) // 2
            seen[middle] = int(draws[middle, :n].sum())
            low, high = (middle + 1, high) if seen[middle] else (low, middle)
        spent += n * len(seen)
        good = [right for right in seen.values() if right] or [n]
        right = [seen.get(step, round(np.mean(good)) if step < low else 0) for step in range(len(draws))]
        tallies.append(Tally(n, right, [n] * len(draws), [n] * len(draws)))
    return top(tallies, fraction, alpha), spent / sum(draws.size for draws in corpus)


def compare(corpus: list[np.ndarray]) -> list[dict]:
    rows = []
    for fraction, alpha in CUTS:
        expected, _ = fewer(corpus, fraction, alpha, N)
        ways = [("race, exact", race, [0.0]), ("race, confident", race, [0.01, 0.03, 0.1])]
        ways += [("fixed smaller N", fewer, [1, 2, 3, 4, 6, 8, 12])]
        ways += [("until the first right draw", until_right, [0, 1, 2, 4, 8])]
        ways += [("binary search", binary_search, [2, 4, 8, 16])]
        for name, way, settings in ways:
            for setting in settings:
                kept, spent = way(corpus, fraction, alpha, setting)
                overlap = len(kept & expected) / len(expected)
                rows.append(
                    {"fraction": fraction, "alpha": alpha, "way": name, "setting": setting, "draws": spent}
                    | {"overlap": overlap}
                )
                print(
                    f"{fraction:4.0%} {name:28} {setting:6} {spent:7.1%} of the draws, overlap {overlap:.3f}",
                    flush=True,
                )
    return rows


def draw_figure(figure: Figure, results: dict) -> None:
    """Overlap by share of draws: one panel per corpus and share kept, one curve per way."""
    corpora = list(results["corpora"])
    axes = figure.subplots(len(corpora), len(CUTS), sharex=True, sharey=True, squeeze=False)
    for line, corpus in zip(axes, corpora, strict=True):
        for axis, (fraction, _) in zip(line, CUTS, strict=True):
            rows = [row for row in results["corpora"][corpus]["ways"] if row["fraction"] == fraction]
            for way, look in LOOKS.items():
                points = sorted((row["draws"], row["overlap"]) for row in rows if row["way"] == way)
                axis.plot(*zip(*points, strict=True), ms=5, lw=1.4, label=way, **look)
            axis.set_title(f"{corpus}, {fraction:.0%} kept", fontsize=10)
    axes[0][0].legend(fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("share of all draws")
    for line in axes:
        line[0].set_ylabel("overlap with all draws' selection")
    figure.suptitle("The race finds what all draws would keep, with a fifth to two fifths of them")


def save_figure(results: dict, folder: Path) -> None:
    save_light_and_dark(lambda figure: draw_figure(figure, results), folder / "draws.png", (9, 7.2), 110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--draw", action="store_true", help="only draw the figure of the results.json in the folder")
    args = parser.parse_args()
    if args.draw:
        save_figure(json.loads((args.output / "results.json").read_text(encoding="utf-8")), args.output)
        return
    results = {"rollouts": args.rollouts, "seed": args.seed, "n": N, "corpora": {}}
    for name, make in (("like the paper's", paper_like), ("the miniature", miniature)):
        corpus = make(args.rollouts, args.seed)
        print(name, figures(corpus), flush=True)
        results["corpora"][name] = {"figures": figures(corpus), "ways": compare(corpus)}
    args.output.mkdir(parents=True, exist_ok=True)
    write_json(results, args.output / "results.json")
    save_figure(results, args.output)


if __name__ == "__main__":
    main()
