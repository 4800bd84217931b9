"""The theory recipe: its quick run agrees with the paper's formulas, wrong formulas are caught, the README is the kept run."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest


FOLDER = Path(__file__).parents[2] / "recipes" / "theory"


@pytest.fixture(scope="module")
def simulate():
    specification = importlib.util.spec_from_file_location("simulate", FOLDER / "simulate.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules["simulate"] = module  # its dataclasses look themselves up by module
    specification.loader.exec_module(module)
    yield module
    del sys.modules["simulate"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> tuple[Path, dict, str]:
    """The quick run as a user starts it: its folder, its results, what it printed."""
    folder = tmp_path_factory.mktemp("theory")
    command = [sys.executable, FOLDER / "simulate.py", "--output", folder, "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return folder, json.loads((folder / "results.json").read_text()), done.stdout


def test_every_prediction_lies_in_its_interval(quick):
    """At 1% over all points of a claim (Bonferroni); and no more than 10% of all points miss their 95% interval."""
    _, results, _ = quick
    assert results["level"] == 0.01
    for name, claim in results["claims"].items():
        assert claim["smallest_p"] >= 0.01 / claim["points"], name
        assert claim["agrees"], name
    counts = [(claim["points"], claim["inside_95"]) for claim in results["claims"].values()]
    points, inside = map(sum, zip(*counts, strict=True))
    assert points == 246
    assert inside / points > 0.9
    assert [row["broken"] for row in results["inequalities"]] == [0] * 5


def test_scaling_comes_out_as_the_readme_says(quick):
    _, results, _ = quick
    minimiser, last, _ = results["scaling"]["matched"]
    single_last, single_average = results["scaling"]["single_pass"]
    assert minimiser["exponent_low"] < -1 < minimiser["exponent_high"]  # faster than the bound
    assert -0.7 < single_last["exponent_low"] < single_last["exponent_high"] < -0.4  # about as the bound
    assert single_average["exponent_high"] < -0.8
    assert all(part["low"] < 1 < part["high"] for part in results["decomposition"])  # the two terms add


def test_run_writes_table_and_figures(quick):
    folder, results, printed = quick
    figures = {f"{name}{mode}.png" for name in [*results["claims"], "scaling"] for mode in ("", "-dark")}
    assert {path.name for path in folder.iterdir()} == figures | {"results.json", "table.md"}
    assert (folder / "table.md").read_text() in printed
    assert all(sentence in printed for sentence in results["words"])


def test_wrong_formula_is_caught(simulate):
    """Without the factor 1 - 4 eta, and with the biased mixture, the draws disagree."""
    points = simulate.flipped_moment(np.random.default_rng(0), 2_000, flips=(0.1,))
    assert simulate.summarise(points)["agrees"]
    wrong = []
    for point in points:
        predicted = (point.x * (1 - point.x) + 0.1) * 8
        p_value = simulate.mean_point("", 0, predicted, _two_values(point, 2_000)).p_value
        wrong.append(replace(point, predicted=predicted, p_value=p_value))
    assert not simulate.summarise(wrong)["agrees"]
    draws = np.random.default_rng(0).binomial(5, 0.4, 2_000) / 5
    assert simulate.mean_point("", 5, 0.24, draws * (1 - draws)).p_value < 1e-6
    assert simulate.mean_point("", 5, 0.24 * 0.8, draws * (1 - draws)).p_value > 1e-3


def _two_values(point, draws: int) -> np.ndarray:
    """Draws with the mean of `point` and the two values that the squared gradient has."""
    high, low = 8 * max(point.x, 1 - point.x) ** 2, 8 * min(point.x, 1 - point.x) ** 2
    share = (point.simulated - low) / (high - low)
    return np.where(np.arange(draws) < share * draws, high, low)


def test_exact_intervals(simulate):
    """No success in 20 trials: the upper 95% limit is 1 - 0.025^(1/20); the p-value of 0.5 is 2 * 0.5^20."""
    point = simulate.share_point("", 0, 0.5, hits=0, draws=20)
    assert (point.low, point.high) == (0, pytest.approx(1 - 0.025 ** (1 / 20)))
    assert point.p_value == pytest.approx(2 * 0.5**20)


def test_excess_risk_is_zero_at_the_teacher_and_the_minimiser_is_one(simulate):
    teacher = simulate.Teacher(np.random.default_rng(0))
    assert teacher.excess_risk(teacher.w[None])[0] == pytest.approx(0, abs=1e-12)
    moved = teacher.w + 0.1 * np.eye(8)
    assert (teacher.excess_risk(moved) > 1e-4).all()
    found = teacher.minimise(np.random.default_rng(1), 10**7, 1)
    np.testing.assert_allclose(found[0], teacher.w, atol=0.01)


def test_exponent_of_a_power_law(simulate):
    sizes = [10, 100, 1000]
    noise = np.random.default_rng(0).gamma(100, 0.01, (3, 400))
    curve = simulate.fit_exponent(np.random.default_rng(1), "", sizes, 7 * np.array(sizes)[:, None] ** -0.5 * noise)
    assert curve.exponent_low < -0.5 < curve.exponent_high
    assert curve.exponent_high - curve.exponent_low < 0.02


def test_readme_is_the_kept_run(simulate):
    results = json.loads((FOLDER / "results.json").read_text())
    readme = (FOLDER / "README.md").read_text()
    assert not results["quick"]
    assert all(claim["agrees"] for claim in results["claims"].values())
    assert simulate.table(results) in readme
    assert simulate.words(results) == results["words"]
    for sentence in results["words"]:
        assert sentence in readme
    for name in [*results["claims"], "scaling"]:
        for file, used in ((f"{name}.png", "src"), (f"{name}-dark.png", "srcset")):
            assert (FOLDER / file).is_file() and f'{used}="{file}"' in readme
    assert f"{results['seed']}" in readme and f"{results['draws']:,} per point" in readme
    assert results["seconds"] < 60
