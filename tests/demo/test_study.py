"""The study recipe: its plan, its runs in a tiny world, its going on after a stop, and the kept report."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from trl_mprm.demo.settings import DEMO


FOLDER = Path(__file__).parents[2] / "recipes" / "study"
TINY = replace(DEMO, problems=60, validation_problems=10, benchmark_problems=20)


@pytest.fixture(scope="module")
def study():
    sys.path.insert(0, str(FOLDER))  # as Python does for `python recipes/study/study.py`
    import study

    yield study
    sys.path.remove(str(FOLDER))


def test_plan_names_every_arm_with_every_seed(study):
    tasks = study.plan()
    assert len(tasks) == len(set(tasks)) and len(study.SEEDS) >= 5
    expected = {("standard", arm, seed) for arm in study.ARMS for seed in study.SEEDS}
    expected |= {(world, arm, seed) for world in study.WORLDS[1:] for arm in study.ROBUSTNESS for seed in study.SEEDS}
    assert set(tasks) == expected


def test_worlds_differ_in_one_thing(study):
    standard = vars(DEMO)
    for world in study.WORLDS:
        changed = [name for name, value in vars(study.settings_of(world, DEMO)).items() if value != standard[name]]
        assert changed == {"standard": [], "weaker base": []}.get(
            world, ["policy" if "policy" in world else "options"]
        )


@pytest.mark.slow
def test_runs_and_goes_on_where_it_stopped(study, tmp_path, capfd):
    from report import write_report

    arms = ("zero-shot", "random10", "bis10-hash", "true10", "full-soft")
    tasks = [("standard", arm, seed) for arm in arms for seed in (1, 2)] + [("heavier noise", "bis10", 1)]
    study.run_all(tmp_path, tasks, TINY)
    records = {path.name: path.read_bytes() for path in (tmp_path / "records").iterdir()}
    assert len(records) == len(tasks)
    runs = {(run["arm"], run["seed"]): run for run in study.read_records(tmp_path)["runs"]}
    files = (tmp_path / "worlds" / "standard-1" / "corpus" / "annotations").glob("*.jsonl")
    assert runs["random10", 1]["rollouts"] == sum(
        max(1, int(len(file.read_text().splitlines()) * 0.1)) for file in files
    )
    assert runs["full-soft", 1]["rollouts"] == 240 and runs["full-soft", 1]["optimizer_steps"] == 60
    assert runs["true10", 1]["wrong_but_positive"] == runs["random10", 1]["wrong_but_positive"]  # the same rows
    assert runs["true10", 1]["macro_f1_pooled"] != runs["random10", 1]["macro_f1_pooled"]  # other labels

    lost = next((tmp_path / "records").glob("*random10-2.json"))
    lost.unlink()
    study.run_all(tmp_path, tasks, TINY)
    assert "10 of 11 runs are done" in capfd.readouterr().out
    again, before = json.loads(lost.read_text()), json.loads(records[lost.name])
    assert again | {"seconds": 0} == before | {"seconds": 0}

    study.write_json(study.read_records(tmp_path), tmp_path / "results.json")
    corpora = study.take_records(tmp_path / "results.json", tmp_path / "taken")
    assert corpora == study.read_records(tmp_path)["corpora"] and "standard-1" in corpora
    assert {path.name for path in (tmp_path / "taken" / "records").iterdir()} == records.keys()
    write_report(tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "saturation.png", "rules.png", "labels.png", "robustness.png"
    }  # fmt: skip


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


def test_verdicts_follow_the_interval(study):
    from report import Study, verdict

    runs = [{"world": "standard", "arm": arm, "seed": seed, "macro_f1_step_weighted": f1, "auc": f1}
            for arm, values in {"a": (0.50, 0.52), "b": (0.60, 0.63), "c": (0.50, 0.60)}.items()
            for seed, f1 in enumerate(values)]  # fmt: skip
    study_of = Study({"arms": dict.fromkeys("abc"), "runs": runs})
    better = study_of.difference("b", "a")  # 10 and 11 points: 10.5 -+ 12.706 * 0.7071 / sqrt(2)
    assert better["mean"] == pytest.approx(10.5) and better["low"] == pytest.approx(10.5 - 6.353)
    assert [verdict(better, expected) for expected in (1, -1, 0)] == ["yes", "the opposite", "better than that"]
    open_ = study_of.difference("c", "a")
    assert [verdict(open_, expected) for expected in (1, -1, 0)] == ["inconclusive"] * 3


@pytest.mark.skipif(not (FOLDER / "results.json").is_file(), reason="no kept run")
def test_the_kept_report_is_that_of_the_kept_runs(study, tmp_path, capsys):
    from report import write_report

    (tmp_path / "results.json").write_bytes((FOLDER / "results.json").read_bytes())
    write_report(tmp_path)
    assert (tmp_path / "table.md").read_text() == (FOLDER / "table.md").read_text()
