"""The study recipe: its plan, its runs in a tiny world, its going on after a stop, and the kept report."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from trl_mprm.demo.settings import DEMO


FOLDER = Path(__file__).parents[2] / "recipes" / "study"
TINY = replace(DEMO, problems=60, benchmark_problems=20)


@pytest.fixture(scope="module")
def study():
    sys.path.insert(0, str(FOLDER))  # as Python does for `python recipes/study/study.py`
    import study

    yield study
    sys.path.remove(str(FOLDER))


def test_plan_names_every_arm_and_its_seeds(study):
    runs = [(world, arm, seed) for world, arms, seed in study.plan() for arm in arms]
    assert len(runs) == len(set(runs)) and len(study.SEEDS) >= 12
    expected = {("standard", arm, seed) for arm in (*study.PRIMARY, *study.EXPLORATORY) for seed in study.SEEDS}
    every_seed = study.PRIMARY | study.EXPLORATORY
    expected |= {("standard", arm, seed) for arm in study.ARMS.keys() - every_seed.keys() for seed in study.FEWER}
    expected |= {(world, arm, seed) for world in study.WORLDS[1:3] for arm in study.ROBUSTNESS for seed in study.FEWER}
    expected |= {("replication", arm, seed) for arm in study.REPLICATION for seed in study.NEW_SEEDS}
    assert set(runs) == expected and not set(study.NEW_SEEDS) & set(study.SEEDS)
    blocks = [arms for _, arms, _ in study.plan()]
    assert blocks[: len(study.SEEDS)] == [tuple(study.PRIMARY)] * len(study.SEEDS)  # what matters most comes first
    assert blocks[-2 * len(study.SEEDS) :] == [tuple(study.EXPLORATORY)] * len(study.SEEDS) + [study.REPLICATION] * 12


def test_every_claim_is_about_runs_of_the_plan(study):
    from report import FAMILIES

    runs = {(world, arm) for world, arms, _ in study.plan() for arm in arms}
    claims = [claim for family in FAMILIES for claim in family]
    for claim in claims:
        assert {(claim.world, claim.one), (claim.world, claim.other)} <= runs
    assert len({claim.words for claim in claims}) == len(claims)
    first, second = (plan.read_text() for plan in study.PLANS)
    for seeds, text in ((study.SEEDS, first), (study.FEWER, first), (study.NEW_SEEDS, second)):
        assert f"eeds {seeds[0]} to {seeds[-1]}" in text or f"seeds, {seeds[0]} to {seeds[-1]}" in text


def test_worlds_differ_in_one_thing(study):
    standard = vars(DEMO)
    for world in study.WORLDS:
        changed = [name for name, value in vars(study.settings_of(world, DEMO)).items() if value != standard[name]]
        assert changed == (["options"] if "noise" in world else [])


@pytest.mark.slow
def test_runs_and_goes_on_where_it_stopped(study, tmp_path, capfd):
    from report import write_report

    arms = ("zero-shot", "random10", "bis10-no-answer", "true10", "random10-mixed")
    blocks = [("standard", arms, seed) for seed in (1, 2)] + [("heavier noise", ("bis10",), 1)]
    study.run_all(tmp_path, blocks, TINY)
    records = {path.name: path.read_bytes() for path in (tmp_path / "records").iterdir()}
    assert len(records) == 11
    runs = {(run["arm"], run["seed"]): run for run in study.read_records(tmp_path)["runs"]}
    files = (tmp_path / "worlds" / "standard-1" / "corpus" / "annotations").glob("*.jsonl")
    assert runs["random10", 1]["rollouts"] == sum(
        max(1, int(len(file.read_text().splitlines()) * 0.1)) for file in files
    )
    assert runs["true10", 1]["wrong_but_positive"] == runs["random10", 1]["wrong_but_positive"]  # the same rows
    assert runs["true10", 1]["macro_f1_pooled"] != runs["random10", 1]["macro_f1_pooled"]  # other labels
    assert runs["random10-mixed", 1]["mixed_rollouts"] > 2 * runs["random10", 1]["mixed_rollouts"]

    lost = next((tmp_path / "records").glob("*random10-2.json"))
    lost.unlink()
    study.run_all(tmp_path, blocks, TINY)
    assert "10 of 11 runs are done" in capfd.readouterr().out
    again, before = json.loads(lost.read_text()), json.loads(records[lost.name])
    assert again | {"seconds": 0} == before | {"seconds": 0}

    study.write_json(study.read_records(tmp_path), tmp_path / "results.json")
    corpora = study.take_records(tmp_path / "results.json", tmp_path / "taken")
    assert corpora == study.read_records(tmp_path)["corpora"] and "standard-1" in corpora
    assert {path.name for path in (tmp_path / "taken" / "records").iterdir()} == records.keys()
    kept = json.loads((tmp_path / "results.json").read_text())
    study.write_json(kept | {"plans": {"plan.md": "0"}}, tmp_path / "other.json")
    with pytest.raises(ValueError, match="made by another plan"):
        study.take_records(tmp_path / "other.json", tmp_path / "taken")
    write_report(tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {
        f"{name}{mode}.png" for name in ("primary", "claims", "fractions") for mode in ("", "-dark")
    }


def test_controls_have_what_they_should_of_bis10(study, tmp_path):
    folder = tmp_path / "standard-1"
    study.build_world(folder, TINY, 1)
    scored, *_ = study.load_world(folder)
    best, *_ = study.rows_of(study.ARMS["bis10"], 1, folder)
    mixed, report, _ = study.rows_of(study.ARMS["random10-mixed"], 1, folder)
    counts = [
        sorted(
            (source, study.is_mixed(scores)) for source, scores in zip(rows["source"], rows["mc_scores"], strict=True)
        )
        for rows in (best, mixed)
    ]
    assert counts[0] == counts[1] and report is None and set(best["rollout_id"]) != set(mixed["rollout_id"])
    rows, _, config = study.rows_of(study.ARMS["random10-weighted"], 1, folder)
    good, bad = config["class_weights"]
    assert bad * study.odds_of_bad(rows) == pytest.approx(good * study.odds_of_bad(best))
    shorter, *_ = study.rows_of(study.ARMS["bis10-no-answer"], 1, folder)
    assert not any("answer" in step for steps in shorter["completions"] for step in steps)
    assert [len(row) for row in shorter["labels"]] == [len(row) for row in shorter["completions"]]
    first = {}
    for question, scores in zip(
        zip(scored["source"], scored["prompt"], strict=True), scored["mc_scores"], strict=True
    ):
        first.setdefault(question, []).append(scores[0])
    question = (scored[5]["source"], scored[5]["prompt"])
    assert scored[5]["self_confidence"] == pytest.approx(sum(first[question]) / len(first[question]))


def test_runs_of_another_plan_are_refused(study, tmp_path):
    study.check_plans(tmp_path / "runs")
    study.check_plans(tmp_path / "runs")
    (tmp_path / "runs" / "plan.md").write_text("another plan")
    with pytest.raises(ValueError, match="made by another plan"):
        study.check_plans(tmp_path / "runs")


@pytest.mark.slow
def test_rendered_once_is_rendered_each_time(study, tmp_path):
    from trl_mprm import DataCollatorForProcessReward
    from trl_mprm.demo.base import BASE_MODEL
    from trl_mprm.models.loading import add_marker, load_model, load_processing_class
    from trl_mprm.prompting.step_format import StepFormat

    study.build_world(tmp_path, TINY, 1)
    rows, *_ = study.load_world(tmp_path)
    model, processor = load_model(str(BASE_MODEL)), load_processing_class(str(BASE_MODEL), vision=True)
    add_marker(model, processor, StepFormat())
    once, each_time = study.RenderedOnce(processor), DataCollatorForProcessReward(processor)
    once.remembered = {}
    for batch in ([0, 1, 2, 3], [2, 9, 1, 30], [30, 2, 0, 9]):  # the last one only of rows that were seen
        new, plain = (collator([rows[index] for index in batch]) for collator in (once, each_time))
        assert new.keys() == plain.keys() and all(new[name].equal(plain[name]) for name in plain)
    assert len(once.remembered) > 8


def test_answers_follow_differences_margins_and_holm(study):
    from report import ABOVE, BELOW, EQUAL, NOT_BEHIND, PRIMARY, SECONDARY, Claim, Study, answers, outcome, p_value

    up, level, down = [9.0, 10.0, 11.0], [-0.2, 0.1, 0.3], [-9.0, -10.0, -11.0]
    for kind, differences, expected in (
        (ABOVE, up, "yes"), (ABOVE, level, "not shown"), (ABOVE, down, "the opposite"), (BELOW, down, "yes"),
        (BELOW, up, "the opposite"), (EQUAL, level, "yes"), (EQUAL, up, "not shown"), (EQUAL, [1.9, 2.2, 1.4], "not shown"),
        (NOT_BEHIND, up, "yes"), (NOT_BEHIND, level, "yes"), (NOT_BEHIND, [-2.9, -3.1, -2.0], "not shown"),
    ):  # fmt: skip
        claim = Claim("claim", "one", "other", kind)
        assert outcome(claim, differences, p_value(claim, differences)) == expected

    f1 = {"random10": 0.80, "bis10": 0.85, "full": 0.85, "zero-shot": 0.5, "true10": 0.801}
    noise = {"bis10": (0.001, -0.001, 0.002), "true10": (0.011, -0.007, 0.004)}
    runs = [{"world": "standard", "arm": arm, "seed": seed, "macro_f1_step_weighted": value + noise.get(arm, (0, 0, 0))[seed],
             "auc": value} for arm, value in f1.items() for seed in range(3)]  # fmt: skip
    runs[6]["macro_f1_step_weighted"] += 0.001  # full against zero-shot must have a spread
    found = answers(Study({"arms": dict.fromkeys(f1), "runs": runs}))
    assert [found[claim][2] for claim in PRIMARY] == ["yes", "yes"]
    by_words = {claim.words: found[claim] for claim in SECONDARY}
    lift = by_words["training on Monte Carlo labels lifts the base"]
    assert lift[2] == "yes" and lift[1] == pytest.approx(2 * p_value(SECONDARY[0], lift[0]))  # Holm: two were run
    assert by_words["true labels are better, the same random 10%"][2] == "not shown"
    assert by_words["BIS-25% beats random-25%"][1:] == (None, "not run")


def test_a_fixed_sequence_ends_with_the_first_that_is_not_shown(study):
    from report import REPLICATION, REPLICATION_SEEDS, Study, answers

    assert len(study.NEW_SEEDS) == REPLICATION_SEEDS

    def words(seeds=12, **f1):
        runs = [{"world": "replication", "arm": arm.replace("_", "-"), "seed": seed, "auc": 0.9,
                 "macro_f1_step_weighted": value + 0.001 * (seed % 3) * ("bis" in arm)}
                for arm, value in f1.items() for seed in range(seeds)]  # fmt: skip
        found = answers(Study({"arms": [], "runs": runs}))
        assert [found[claim][1] for claim in REPLICATION] == sorted(found[claim][1] for claim in REPLICATION)
        return [found[claim][2] for claim in REPLICATION]

    levels = {"bis10_3_epochs": 0.9, "random10_3_epochs": 0.85, "bis10": 0.9, "random10": 0.85, "full": 0.9}
    assert words(**levels) == ["yes"] * 4
    assert words(**levels | {"random10": 0.901}) == ["yes", "yes", "not shown", "not shown"]
    assert words(**levels | {"bis10_3_epochs": 0.8}) == ["the opposite"] + ["not shown"] * 3
    assert words(**levels | {"full": 0.93}) == ["yes"] + ["not shown"] * 3
    assert words(seeds=11, **levels) == ["not complete"] * 4


@pytest.mark.skipif(not (FOLDER / "results.json").is_file(), reason="no kept run")
def test_the_kept_report_is_that_of_the_kept_runs(study, tmp_path, capsys):
    from report import write_report

    (tmp_path / "results.json").write_bytes((FOLDER / "results.json").read_bytes())
    write_report(tmp_path)
    report = (tmp_path / "table.md").read_text()
    assert report == (FOLDER / "table.md").read_text()
    parts = report.rstrip().split("\n\n")
    tables = dict(zip(parts[::2], parts[1::2], strict=True))
    del tables["## Every arm"]
    page = (FOLDER / "README.md").read_text()
    assert len(tables) == 6 and all(f"#{title}\n\n{table}" in page for title, table in tables.items())
    kept = json.loads((FOLDER / "results.json").read_text())
    frozen = {"plan.md": "848b4e3c98bb", "replication.md": "71323ee3cc44"}  # committed before the first of their runs
    assert {name: kept["plans"][name][:12] for name in kept["plans"]} == frozen
    assert kept["plans"] == study.hashes()
