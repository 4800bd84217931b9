"""
The paper's theory against simulation: the linear teacher-student logistic model with Monte Carlo labels.

Paper: arXiv 2602.04145v2; equation numbers are the paper's.
Command: `python recipes/theory/simulate.py --output DIR`; two cores, no GPU, about a minute. Seeds are fixed.

Every prediction is compared with draws of the model itself, as

    q* = 0.3, ||phi||^2 = 8:  predicted q*(1 - q*) ||phi||^2 = 1.680,  simulated 1.679, 95% interval 1.664 to 1.694

DIR receives `results.json` (every point of every figure), the figures, each for light and for dark ground, and
`table.md`; with `--draw` only the figures, from the `results.json` that lies there. matplotlib comes with the
`demo` extra; scipy with scikit-learn (`dev`), for exact binomial intervals and the regularised incomplete beta function.
"""

import argparse
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy import stats
from scipy.special import betainc, expit
from tqdm.auto import tqdm

from trl_mprm.files import write_json
from trl_mprm.plotting import save_light_and_dark


SEED = 20260205
LEVEL = 0.01  # a claim agrees where no point is further from its prediction than chance at this level, over all points
N_CONTINUATIONS = 16  # Monte Carlo continuations of a step, as in VisualPRM400K
MARKERS = ("o", "s", "^", "D")


@dataclass(frozen=True)
class Point:
    """One prediction and the simulation of it, with its 95% interval and the two-sided p-value of the prediction."""

    series: str
    x: float
    predicted: float
    simulated: float
    low: float
    high: float
    p_value: float


def mean_point(series: str, x: float, predicted: float, draws: np.ndarray) -> Point:
    """Compare a predicted expectation with the mean of independent draws (normal interval)."""
    mean, error = draws.mean(), draws.std(ddof=1) / np.sqrt(len(draws))
    exact = np.isclose(mean, predicted, rtol=1e-9)  # where every draw is the same
    p_value = float(exact) if error < 1e-12 else 2 * stats.norm.sf(abs(mean - predicted) / error)
    return Point(series, x, predicted, mean, mean - 1.96 * error, mean + 1.96 * error, p_value)


def share_point(series: str, x: float, predicted: float, hits: int, draws: int) -> Point:
    """Compare a predicted probability with a count (Clopper-Pearson interval, exact binomial test)."""
    test = stats.binomtest(int(hits), int(draws), predicted)
    low, high = test.proportion_ci(0.95, method="exact")
    return Point(series, x, predicted, hits / draws, low, high, test.pvalue)


# The claims about one step and one rollout. Each takes the generator and the number of draws per point.


def gradient_moment(rng: np.random.Generator, draws: int) -> list[Point]:
    """Equation 5: at w*, the gradient g = (q* - y) phi has E[||g||^2 | phi] = q*(1 - q*) ||phi||^2."""
    return flipped_moment(rng, draws, flips=(0.0,))


def flipped_moment(
    rng: np.random.Generator, draws: int, flips: Sequence[float] = (0.1, 0.25, 0.4, 0.5)
) -> list[Point]:
    """Equation 6: labels flipped with probability eta give [(1 - 4 eta) q*(1 - q*) + eta] ||phi||^2."""
    along, across = np.linalg.qr(rng.normal(size=(8, 2)))[0].T  # the direction of w* and one orthogonal to it
    teacher = 3 * along
    points = []
    for eta in flips:
        for q in np.linspace(0.04, 0.96, 24):
            part = np.log(q / (1 - q)) / 3  # of phi along w*: the teacher gives the probability q
            phi = part * along + np.sqrt(8 - part**2) * across
            y = (rng.random(draws) < expit(teacher @ phi)) ^ (rng.random(draws) < eta)
            gradient = (expit(teacher @ phi) - y)[:, None] * phi
            predicted = ((1 - 4 * eta) * q * (1 - q) + eta) * 8
            points.append(mean_point(f"η = {eta:g}", q, predicted, (gradient**2).sum(1)))
    return points


def moment_contrast(rng: np.random.Generator, draws: int) -> list[Point]:
    """The sign in equation 6: the moment at q* = 1/2 less the moment at q* = 0.05, which is (1 - 4 eta)(1/4 - 0.0475)."""
    points = []
    for eta in np.linspace(0, 0.5, 11):
        y = rng.random((2, draws)) < np.array([[0.5], [0.05]])
        y ^= rng.random((2, draws)) < eta
        squares = (np.array([[0.5], [0.05]]) - y) ** 2
        points.append(mean_point("‖φ‖² = 1", eta, (1 - 4 * eta) * (0.25 - 0.0475), squares[0] - squares[1]))
    return points


PROFILES: dict[str, Callable[[int], np.ndarray]] = {  # step probabilities of a rollout; all have the mean 0.4
    "all steps alike": lambda n: np.full(n, 0.4),
    "spread 0.05 to 0.75": lambda n: np.linspace(0.05, 0.75, n),
    "every step sure": lambda n: (np.arange(n) < 0.4 * n).astype(float),
}


def mixture(rng: np.random.Generator, draws: int) -> list[Point]:
    """Equation 7: E[p(1 - p)] of the label share p is mean q (1 - mean q) - (1/n^2) sum q_j (1 - q_j)."""
    points = []
    for series, profile in PROFILES.items():
        for n in (5, 10, 20, 40):
            q = profile(n)
            p = (rng.random((draws, n)) < q).mean(1)
            predicted = q.mean() * (1 - q.mean()) - (q * (1 - q)).sum() / n**2
            points.append(mean_point(series, n, predicted, p * (1 - p)))
    return points


def flipped_mixture(rng: np.random.Generator, draws: int) -> list[Point]:
    """Equation 10: theta = mean q (1 - mean q) becomes (1 - 2 eta)^2 theta + eta (1 - eta)."""
    points = []
    for mean in (0.1, 0.3, 0.5):
        q = np.clip(np.linspace(mean - 0.1, mean + 0.1, 6), 0, 1)
        theta = q.mean() * (1 - q.mean())
        for eta in np.linspace(0, 0.5, 11):
            # Two independent labellings of the rollout: p (1 - p') is an unbiased draw of theta, p (1 - p) is not.
            p, other = (((rng.random((draws, 6)) < q) ^ (rng.random((draws, 6)) < eta)).mean(1) for _ in range(2))
            predicted = (1 - 2 * eta) ** 2 * theta + eta * (1 - eta)
            points.append(mean_point(f"mean q = {mean:g}", eta, predicted, p * (1 - other)))
    return points


def positive_label(rng: np.random.Generator, draws: int) -> list[Point]:
    """Lemma 3's labels: a step whose continuations succeed with probability r is labelled good with 1 - (1 - r)^N."""
    points = []
    for n in (1, 4, N_CONTINUATIONS):
        for r in np.concatenate([[0.005, 0.02], np.linspace(0.05, 0.5, 10)]):
            hits = (rng.binomial(n, r, draws) > 0).sum()
            points.append(share_point(f"N = {n}", r, 1 - (1 - r) ** n, hits, draws))
    return points


PRIORS = {"prior Beta(1, 1)": (1.0, 1.0), "prior Beta(1.2, 0.2)": (1.2, 0.2)}
TAU = 0.5


def reliability(rng: np.random.Generator, draws: int) -> list[Point]:
    """Lemma 3: eta_eff(k) = Pr(r < tau | K = k) = I_tau(a + k, b + N - k)."""
    points = []
    for series, (a, b) in PRIORS.items():
        r = rng.beta(a, b, 60 * draws)  # shared out over the 17 counts, unevenly
        counts = rng.binomial(N_CONTINUATIONS, r)
        for k in range(N_CONTINUATIONS + 1):
            seen = counts == k
            predicted = betainc(a + k, b + N_CONTINUATIONS - k, TAU)
            points.append(share_point(series, k, predicted, (r[seen] < TAU).sum(), seen.sum()))
    return points


# The scaling of the excess risk.


class Teacher:
    """
    A well-specified linear logistic teacher on finitely many bounded features, so that the risk is exact.

    512 features of 8 coordinates, uniform in [-sqrt 3, sqrt 3]; ||w*|| = 1.5; W is the ball of twice that radius.
    """

    def __init__(self, rng: np.random.Generator):
        self.features = rng.uniform(-np.sqrt(3), np.sqrt(3), (512, 8))
        direction = rng.normal(size=8)
        self.w = 1.5 * direction / np.linalg.norm(direction)
        self.q = expit(self.features @ self.w)
        self.radius = 3.0

    def excess_risk(self, w: np.ndarray) -> np.ndarray:
        """L(w) - L(w*) of each row of `w`: the mean of KL(q* || q_w) over the features."""
        logits = w @ self.features.T
        student = -self.q * np.logaddexp(0, -logits) - (1 - self.q) * np.logaddexp(0, logits)
        return (self.q * np.log(self.q) + (1 - self.q) * np.log(1 - self.q) - student).mean(-1)

    def sgd(
        self, sample: Callable[[int], tuple[np.ndarray, np.ndarray]], rows: int, checkpoints: Sequence[int]
    ) -> dict[str, np.ndarray]:
        """
        Projected SGD with eta_t = t^(-1/2) on `rows` runs at once, from w = 0.

        Returns:
            `dict[str, np.ndarray]`: excess risk of the `last` iterate and of the `average` iterate, each of shape
            `(checkpoints, rows)`.
        """
        w, total = np.zeros((rows, 8)), np.zeros((rows, 8))
        risks: dict[str, list[np.ndarray]] = {"last": [], "average": []}
        for t in tqdm(range(1, max(checkpoints) + 1), desc="SGD", unit="step", delay=2, leave=False):
            if t % 1024 == 1:
                indices, labels = sample(1024)
            phi, y = self.features[indices[(t - 1) % 1024]], labels[(t - 1) % 1024]
            w -= t**-0.5 * ((expit((w * phi).sum(1)) - y)[:, None] * phi)
            w *= np.minimum(1, self.radius / np.maximum(np.linalg.norm(w, axis=1, keepdims=True), 1e-12))
            total += w
            if t in checkpoints:
                risks["last"].append(self.excess_risk(w))
                risks["average"].append(self.excess_risk(total / t))
        return {name: np.stack(values) for name, values in risks.items()}

    def minimise(self, rng: np.random.Generator, n: int, rows: int) -> np.ndarray:
        """The minimiser of the empirical risk on `n` samples, for `rows` data sets, by Newton's method."""
        seen = rng.multinomial(n, np.full(512, 1 / 512), rows)
        good = rng.binomial(seen, self.q)
        w = np.zeros((rows, 8))
        for _ in range(12):
            q = expit(w @ self.features.T)
            gradient = (seen * q - good) @ self.features
            hessian = np.einsum("rm,mi,mj->rij", seen * q * (1 - q), self.features, self.features, optimize=True)
            w -= np.linalg.solve(hessian, gradient[..., None])[..., 0]
        if np.linalg.norm(w, axis=1).max() > self.radius:
            raise RuntimeError(f"a minimiser on {n} samples lies outside W: take more samples")
        return w


@dataclass(frozen=True)
class Scaling:
    """Mean excess risk against a size, with 95% intervals, and the exponent fitted to it."""

    series: str
    size: list[int]
    risk: list[float]
    low: list[float]
    high: list[float]
    exponent: float
    exponent_low: float
    exponent_high: float


def fit_exponent(rng: np.random.Generator, series: str, size: Sequence[int], risks: np.ndarray) -> Scaling:
    """Fit risk = c * size^exponent to the means by least squares in logarithms; intervals by bootstrap over runs."""
    x = np.log(size)

    def slope(mean: np.ndarray) -> np.ndarray:
        y = np.log(mean)
        return ((x - x.mean()) * (y - y.mean(-1, keepdims=True))).sum(-1) / ((x - x.mean()) ** 2).sum()

    runs = risks.shape[1]
    means = np.stack([risks[:, rng.integers(runs, size=runs)].mean(1) for _ in range(2000)])
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    slopes = np.percentile(slope(means), [2.5, 97.5])
    mean = risks.mean(1)
    return Scaling(
        series, list(size), mean.tolist(), low.tolist(), high.tolist(), float(slope(mean)), *slopes.tolist()
    )


def scaling(rng: np.random.Generator, runs: int, quick: bool) -> tuple[dict[str, list[Scaling]], list[dict]]:
    """
    Equation 4: the excess risk on a fraction gamma of the data, under matched updates and under a single pass.

    Returns the curves of both, and, for each data size under matched updates, the risk of the last iterate (`together`)
    over the `sum` of the two terms measured apart: the empirical minimiser on so much data, and SGD on fresh data for
    so many updates.
    """
    teacher = Teacher(rng)
    updates = 2**11 if quick else 2**14
    sizes = [updates >> shift for shift in range(0, 4 if quick else 7)][::-1]

    minimisers = np.stack([teacher.excess_risk(teacher.minimise(rng, n, 4 * runs)) for n in sizes])

    # Matched updates: each row of SGD has its own data set of its own size, and as many updates as all others.
    owners = np.repeat(sizes, runs)
    data = [rng.integers(512, size=n) for n in owners]
    labels = [rng.random(n) < teacher.q[own] for n, own in zip(owners, data, strict=True)]
    padded_data, padded_labels = (
        np.stack([np.pad(own, (0, updates - len(own))) for own in part]) for part in (data, labels)
    )

    def again(steps: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = (rng.random((steps, len(owners))) * owners).astype(int)
        rows = np.arange(len(owners))
        return padded_data[rows, chosen], padded_labels[rows, chosen]

    matched = teacher.sgd(again, len(owners), [updates])
    matched = {name: risks[0].reshape(len(sizes), runs) for name, risks in matched.items()}

    def fresh(steps: int) -> tuple[np.ndarray, np.ndarray]:
        indices = rng.integers(512, size=(steps, runs))
        return indices, rng.random((steps, runs)) < teacher.q[indices]

    # eta_t does not depend on T: the first T steps of a long pass are the single pass over T samples.
    passes = [2**exponent for exponent in range(8, 12 if quick else 17)]
    single = teacher.sgd(fresh, runs, passes)
    curves = {
        "matched": [
            fit_exponent(rng, "empirical minimiser, no SGD", sizes, minimisers),
            *(
                fit_exponent(rng, f"SGD, {updates:,} updates, {name} iterate", sizes, matched[name])
                for name in matched
            ),
        ],
        "single_pass": [fit_exponent(rng, f"SGD, {name} iterate", passes, single[name]) for name in single],
    }
    optimisation = single["last"][passes.index(updates)]
    decomposition = []
    for n, data_term, together in zip(sizes, minimisers, matched["last"], strict=True):
        ratio = together.mean() / (data_term.mean() + optimisation.mean())
        spread = [sample.var(ddof=1) / len(sample) for sample in (together, data_term, optimisation)]
        error = np.hypot(np.sqrt(spread[0]), ratio * np.sqrt(spread[1] + spread[2]))
        error /= data_term.mean() + optimisation.mean()
        low, high = ratio - 1.96 * error, ratio + 1.96 * error
        sum_of_terms = data_term.mean() + optimisation.mean()
        decomposition.append({"size": n, "sum": sum_of_terms, "ratio": ratio, "low": low, "high": high})
    return curves, decomposition


# Figures and table.


@dataclass(frozen=True)
class Claim:
    """A statement of the paper: how to simulate it, its formula for the table, and the words of its figure."""

    simulate: Callable[[np.random.Generator, int], list[Point]]
    formula: str
    title: str
    x_label: str
    y_label: str


CLAIMS = {
    "gradient": Claim(
        gradient_moment,
        "E‖g‖² = q*(1 − q*)‖φ‖²",
        "Steps that may go either way have the largest gradients",
        "chance that the step is good",
        "mean squared gradient",
    ),
    "flips": Claim(
        flipped_moment,
        "E‖g̃‖² = [(1 − 4η) q*(1 − q*) + η]‖φ‖²",
        "Flipped labels give sure steps large gradients too",
        "chance that the step is good",
        "mean squared gradient",
    ),
    "sign": Claim(
        moment_contrast,
        "E‖g̃‖² at q* = 1/2 less q* = 0.05: (1 − 4η) · 0.2025",
        "Beyond one flipped label in four, sure steps have the larger gradients",
        "share of labels flipped",
        "squared gradient, open less sure step",
    ),
    "mixture": Claim(
        mixture,
        "E[p̂(1 − p̂)] = q̄(1 − q̄) − Σ qⱼ(1 − qⱼ)/n²",
        "The mixture that labels show falls a little short of the true one",
        "steps of the rollout",
        "mean mixture of the labels",
    ),
    "mixture_flips": Claim(
        flipped_mixture,
        "θ̃ = (1 − 2η)² θ + η(1 − η)",
        "Flipped labels make every rollout look mixed",
        "share of labels flipped",
        "mixture of the flipped labels",
    ),
    "positive_label": Claim(
        positive_label,
        "Pr(y = 1) = 1 − (1 − r)ᴺ",
        "The more continuations, the more steps are labelled good",
        "success rate of one continuation",
        "chance that the step is labelled good",
    ),
    "reliability": Claim(
        reliability,
        "η_eff(k) = I_τ(a + k, b + N − k), τ = 1/2, N = 16",
        "The more continuations succeed, the less a good label is in doubt",
        "successful continuations of 16",
        "chance that the true rate is below one half",
    ),
}


def legend(series: str) -> str:
    """
    The name of a series in the words of a figure.

        "η = 0.25" -> "25% of labels flipped"
    """
    series = re.sub(r"η = ([\d.]+)", lambda found: f"{float(found[1]):.0%} of labels flipped", series)
    series = re.sub("^spread", "chances spread from", series)
    series = re.sub(r"mean q = ([\d.]+)", lambda found: f"{float(found[1]):.0%} of steps good", series)
    return re.sub(r"^N = (\d+)$", lambda found: f"{found[1]} continuation{'s' if found[1] != '1' else ''}", series)


def draw_claim(figure: Figure, name: str, points: list[Point]) -> None:
    """Left: predictions as lines, simulations as dots. Right: simulation less prediction with its 95% interval."""
    claim = CLAIMS[name]
    left, right = figure.subplots(1, 2)
    series = list(dict.fromkeys(point.series for point in points))
    width = np.ptp([point.x for point in points])
    for number, label in enumerate(series):
        own = [point for point in points if point.series == label]
        x = np.array([point.x for point in own])
        look = {"color": f"C{number}", "marker": MARKERS[number]}
        left.plot(x, [point.predicted for point in own], color=look["color"], marker="", lw=1.2)
        left.scatter(x, [point.simulated for point in own], s=14, label=legend(label), **look)
        shifted = x + (number - (len(series) - 1) / 2) * width * 0.008
        gap = np.array([point.simulated - point.predicted for point in own])
        bars = np.array([[point.simulated - point.low, point.high - point.simulated] for point in own]).T
        right.errorbar(shifted, gap, yerr=bars, ls="", ms=3, lw=1, capsize=1.5, **look)
    if name == "mixture":
        n = np.linspace(5, 40, 100)
        left.fill_between(n, 0.24 * (1 - 1 / n), 0.24, color="C4", alpha=0.3, lw=0, label="between the paper's bounds")
    if name == "sign":
        left.axvline(0.25, color="C4", lw=0.8, ls=":")
        left.axhline(0, color="C4", lw=0.8, ls=":")
    left.set(xlabel=claim.x_label, ylabel=claim.y_label)
    left.set_title("line: prediction, mark: simulation", fontsize=10)
    right.axhline(0, color="C4", lw=0.8)
    right.set(xlabel=claim.x_label, ylabel="simulation less prediction")
    right.set_title("difference, 95% interval", fontsize=10)
    right.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    if len(series) > 1:
        left.legend(fontsize=8)
    figure.suptitle(claim.title)


def draw_scaling(figure: Figure, parts: dict[str, list[Scaling]], decomposition: list[dict]) -> None:
    """Excess risk against data, log-log, with the fitted exponents and the bound's n^(-1/2) beside them."""
    axes = figure.subplots(1, 2, sharey=True)
    titles = ("a subset, with as many updates as full data", "a subset, in a single pass")
    for axis, title, curves in zip(axes, titles, parts.values(), strict=True):
        for number, curve in enumerate(curves):
            bars = np.array([np.subtract(curve.risk, curve.low), np.subtract(curve.high, curve.risk)])
            look = {"color": f"C{number}", "marker": MARKERS[number], "ms": 4, "lw": 1, "capsize": 3}
            axis.errorbar(curve.size, curve.risk, yerr=bars, label=f"{curve.series}: {curve.exponent:.2f}", **look)
        size = np.array(curves[0].size, float)
        top = max(curve.risk[0] for curve in curves)
        bound = 1.6 * top * (size / size[0]) ** -0.5
        axis.plot(size, bound, "--", color="C3", marker="", lw=1, label="the bound's slope: -0.50")
        axis.set(xscale="log", yscale="log", xlabel="samples")
        axis.set_title(title, fontsize=10)
    apart = [[part[key] for part in decomposition] for key in ("size", "sum")]
    axes[0].plot(*apart, ":", color="C4", marker="", lw=1.5, label="minimiser and SGD on fresh data, summed")
    for axis in axes:
        axis.legend(fontsize=7.5, loc="lower left", title="curve: fitted exponent", title_fontsize=7.5)
    axes[0].set_ylabel("excess risk, nats")
    figure.suptitle("Excess risk against the amount of data")


def draw(results: dict, output: Path) -> None:
    """Draw every figure of the results, for light and for dark ground."""
    for name, claim in results["claims"].items():
        points = [Point(**value) for value in claim["values"]]
        save_light_and_dark(lambda figure: draw_claim(figure, name, points), output / f"{name}.png", (9.5, 3.9), 100)  # noqa: B023
    parts = {part: [Scaling(**curve) for curve in curves] for part, curves in results["scaling"].items()}
    save_light_and_dark(
        lambda figure: draw_scaling(figure, parts, results["decomposition"]), output / "scaling.png", (9.5, 4.5), 100
    )


def summarise(points: list[Point]) -> dict:
    """Count the points whose 95% interval holds the prediction; decide by the smallest p-value, Bonferroni at LEVEL."""
    smallest = min(point.p_value for point in points)
    return {
        "points": len(points),
        "inside_95": sum(bool(point.low - 1e-12 <= point.predicted <= point.high + 1e-12) for point in points),
        "smallest_p": smallest,
        "agrees": bool(smallest >= LEVEL / len(points)),
    }


def inequalities(claims: dict[str, list[Point]]) -> list[dict]:
    """The paper's bounds on the simulated values: points, those that break the bound by more than their interval."""
    theta = 0.4 * 0.6  # of all PROFILES
    clean = {point.series: point.simulated for point in claims["mixture_flips"] if point.x == 0}
    flipped = [(point, abs(point.simulated - clean[point.series])) for point in claims["mixture_flips"] if point.x]
    known = claims["reliability"]
    steps = [(one, two) for one, two in zip(known, known[1:], strict=False) if one.series == two.series]
    rows = {
        "E[p̂(1 − p̂)] ≥ θ(1 − 1/n)": [point.high < theta * (1 - 1 / point.x) - 1e-12 for point in claims["mixture"]],
        "E[p̂(1 − p̂)] ≤ θ": [point.low > theta + 1e-12 for point in claims["mixture"]],
        "θ − E[p̂(1 − p̂)] ≤ 1/(4n)": [theta - point.high > 1 / (4 * point.x) for point in claims["mixture"]],
        "∣θ̃ − θ∣ ≤ 2η": [gap - (point.high - point.low) > 2 * point.x for point, gap in flipped],
        "η_eff(k) decreases in k": [two.low > one.high for one, two in steps],
    }
    return [{"name": name, "points": len(broken), "broken": sum(map(bool, broken))} for name, broken in rows.items()]


def words(results: dict) -> list[str]:
    """The sentences of README.md, with the numbers of this run."""
    data_term, last, _ = results["scaling"]["matched"]
    single_last, single_average = results["scaling"]["single_pass"]

    def fitted(curve: dict) -> str:
        return f"{curve['exponent']:.2f} ({curve['exponent_low']:.2f} to {curve['exponent_high']:.2f})"

    def factor(curve: dict) -> str:
        return f"{curve['risk'][0] / curve['risk'][-1]:.3g}"

    def allowed(curve: dict) -> str:
        ratio = curve["size"][-1] / curve["size"][0]
        return f"1/{ratio:.0f} of the data, where the bound's factor is {ratio**0.5:.0f}"

    ratios = [part["ratio"] for part in results["decomposition"]]
    add = sum(part["low"] <= 1 <= part["high"] for part in results["decomposition"])
    times = 2 * data_term["size"][-1] * data_term["risk"][-1] / 8
    inside = single_last["exponent_low"] <= -0.5 <= single_last["exponent_high"]
    labels = {(point["series"], point["x"]): point for point in results["claims"]["positive_label"]["values"]}
    label = labels[f"N = {N_CONTINUATIONS}", 0.1]["simulated"]
    points = sum(claim["points"] for claim in results["claims"].values())
    missed = points - sum(claim["inside_95"] for claim in results["claims"].values())
    return [
        f"{missed} of the {points} predictions lie outside the 95% interval of their simulation; chance puts about 5% "
        f"there, and less where intervals are exact.",
        f"Data term alone: exponent {fitted(data_term)}, not −1/2; at the most data the risk is {times:.2f} times the "
        f"classical d/(2n) of a well-specified model.",
        f"Single pass, last iterate: exponent {fitted(single_last)}, near the −1/2 of the bound, which is "
        f"{'inside' if inside else 'just outside'} the interval: the risk grows "
        f"{factor(single_last)} times on {allowed(single_last)}.",
        f"Single pass, average iterate: exponent {fitted(single_average)}; the risk grows {factor(single_average)} "
        f"times on {allowed(single_average)}.",
        f"Matched updates, last iterate: the risk grows {factor(last)} times on {allowed(last)}; it is "
        f"{min(ratios):.2f} to {max(ratios):.2f} times the sum of the two terms measured apart "
        f"(equal within the 95% interval at {add} of {len(ratios)} sizes).",
        f"A step whose continuations succeed once in ten is labelled good {label:.0%} of the time at N = 16.",
    ]


def table(results: dict) -> str:
    """The tables of README.md."""
    lines = ["| prediction | points | inside their 95% interval | smallest p | agrees |", "|---|---|---|---|---|"]
    for name, claim in results["claims"].items():
        verdict = "yes" if claim["agrees"] else "no"
        counts = f"{claim['points']} | {claim['inside_95']} | {claim['smallest_p']:.2g}"
        lines.append(f"| `{CLAIMS[name].formula}` | {counts} | {verdict} |")
    lines += ["", "| inequality | points | broken beyond the interval |", "|---|---|---|"]
    lines += [f"| `{row['name']}` | {row['points']} | {row['broken']} |" for row in results["inequalities"]]
    lines += ["", "| excess risk against data | fitted exponent | 95% interval |", "|---|---|---|"]
    for part, curves in results["scaling"].items():
        for curve in curves:
            interval = f"{curve['exponent_low']:.3f} to {curve['exponent_high']:.3f}"
            lines.append(f"| {part.replace('_', ' ')}: {curve['series']} | {curve['exponent']:.3f} | {interval} |")
    return "\n".join(lines) + "\n"


def run(output: str | Path, quick: bool = False) -> dict:
    """
    Simulate every claim, write figures, `table.md` and `results.json` into `output`; return the results.

    Args:
        output (`str`):
            Folder to write.
        quick (`bool`, *optional*, defaults to `False`):
            A few seconds, wider intervals.
    """
    output, started = Path(output), time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    draws = 2_000 if quick else 40_000
    results: dict = {"seed": SEED, "quick": quick, "draws": draws, "level": LEVEL, "claims": {}}
    # A generator each: a claim's draws do not depend on those before it.
    seeds = dict(zip([*CLAIMS, "scaling"], np.random.SeedSequence(SEED).spawn(len(CLAIMS) + 1), strict=True))
    claims = {}
    for name in tqdm(CLAIMS, desc="Claims", delay=2):
        claims[name] = CLAIMS[name].simulate(np.random.default_rng(seeds[name]), draws)
        results["claims"][name] = {**summarise(claims[name]), "values": [asdict(point) for point in claims[name]]}
    results["inequalities"] = inequalities(claims)
    parts, results["decomposition"] = scaling(np.random.default_rng(seeds["scaling"]), 40 if quick else 400, quick)
    results["scaling"] = {part: [asdict(curve) for curve in curves] for part, curves in parts.items()}
    results["words"] = words(results)
    results["seconds"] = round(time.perf_counter() - started, 1)
    results = json.loads(json.dumps(results, default=float))  # plain floats, as a reader of the file gets them
    draw(results, output)
    write_json(results, output / "results.json")
    (output / "table.md").write_text(table(results), encoding="utf-8")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="Simulate the paper's theory; compare every prediction.")
    parser.add_argument("--output", required=True, help="folder for figures, table.md and results.json")
    parser.add_argument("--quick", action="store_true", help="a few seconds, wider intervals")
    parser.add_argument("--draw", action="store_true", help="only draw the figures of the results.json in the folder")
    args = parser.parse_args()
    if args.draw:
        draw(json.loads((Path(args.output) / "results.json").read_text(encoding="utf-8")), Path(args.output))
        return
    results = run(args.output, args.quick)
    print(table(results), *results["words"], sep="\n")
    print(f"\n{results['seconds']} s; figures, table.md and results.json: {args.output}")


if __name__ == "__main__":
    main()
