"""Questions or rollouts in, annotated rows out: what is kept, what is paid, what a killed run leaves, bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from helpers import picture

from trl_mprm import add_bis, load_rollouts, top_fraction
from trl_mprm.annotation.annotate import Plan, annotate, annotate_rollouts
from trl_mprm.annotation.policies import STOP, Draw, Parked, Policy, Reply
from trl_mprm.annotation.questions import from_files
from trl_mprm.cli import main
from trl_mprm.selection.files import select_files


def policy(images, prompt, steps, n, seed):
    """Right as often as the last step says; draw i hangs on seed + i alone."""
    chance = float(steps[-1].split()[-1]) if steps else 0.8
    return ["Answer: 1" if np.random.default_rng(seed + i).random() < chance else "Answer: 0" for i in range(n)]


def rows(n: int, answer_step: bool = True) -> list[dict]:
    rng = np.random.default_rng(5)
    made = []
    for index in range(n):
        chances = [[1.0] * 3, [0.9, 0.8], [0.9, 0.5, 0.0], [0.0, 0.0], [0.7, 0.6, 0.9, 0.8]][rng.integers(5)]
        steps = [f"step {place} is good with {chance}" for place, chance in enumerate(chances)]
        made.append(
            {
                "prompt": f"question {index}?",
                "answer": "1",
                "completions": [*steps, f"Answer: {int(chances[-1] > 0)}"] if answer_step else steps,
                "source": "ab"[index % 2],
                "rollout_id": f"{'ab'[index % 2]}:{index}",
            }
        )
    return made


def test_scores_counts_and_evidence_of_every_step(tmp_path):
    data = annotate(rows(6), policy, checker="exact", n=8, output=tmp_path / "a.jsonl")
    for row, given in zip(data, rows(6), strict=True):
        assert row["completions"] == given["completions"] and row["mc_total"] == 8
        assert row["mc_scores"] == [count / 8 for count in row["mc_counts"]] == row["labels"]
        *sampled, checked = row["draws"]
        assert checked["finish"] == ["checked"] and row["mc_counts"][-1] == 8 * (given["completions"][-1][-1] == "1")
        for step, (draws, count) in enumerate(zip(sampled, row["mc_counts"], strict=False)):
            expected = policy([], "", given["completions"][: step + 1], 8, draws["seed"])
            assert draws["right"] == [int(text == "Answer: 1") for text in expected] and sum(draws["right"]) == count
            assert draws["finish"] == [STOP] * 8 and draws["checker"] == "exact"
    assert len({draws["seed"] for row in data for draws in row["draws"] if draws["seed"]}) == sum(
        len(row["completions"]) - 1 for row in rows(6)
    )


@pytest.mark.parametrize("fraction, alpha", [(0.1, 0.2), (0.3, 0.05)])
def test_exact_budget_returns_the_rows_that_a_selection_keeps_of_all(tmp_path, fraction, alpha):
    given = rows(80)
    everything = annotate(given, policy, checker="exact", n=16, output=tmp_path / "all.jsonl")
    scored = everything.map(add_bis, fn_kwargs={"alpha": alpha})
    expected = scored.filter(top_fraction(scored, fraction))
    options = {"checker": "exact", "budget": "bis", "fraction": fraction, "alpha": alpha}
    kept = annotate(given, policy, output=tmp_path / "kept.jsonl", **options)
    assert kept["rollout_id"] == expected["rollout_id"]
    assert kept["mc_counts"][:] == expected["mc_counts"][:] and set(kept["mc_total"]) == {16}
    report = json.loads((tmp_path / "kept.annotation.json").read_text())
    spent = sum(source["draws"] for source in report["sources"].values())
    planned = sum(source["draws_with_all"] for source in report["sources"].values())
    assert report["spent"]["draws"] == spent < 0.6 * planned
    confident = annotate(given, policy, output=tmp_path / "likely.jsonl", mode="confident", **options)
    assert all(total == 16 for total in confident["mc_total"])


def test_output_is_read_by_load_rollouts_and_select(tmp_path):
    annotate(rows(20), policy, checker="exact", n=4, output=tmp_path / "a.jsonl")
    again = load_rollouts(tmp_path / "a.jsonl")
    assert again["mc_counts"][:] == [json.loads(line)["mc_counts"] for line in open(tmp_path / "a.jsonl")]
    assert set(again["mc_total"]) == {4} and again["source"][:2] == ["a", "b"]
    report = select_files(tmp_path / "a.jsonl", tmp_path / "kept.jsonl", "bis", fraction=0.2)
    assert report["total"]["kept"] == 4


def test_raw_format_has_the_keys_of_visualprm_and_round_trips(tmp_path):
    picture("red").save(tmp_path / "tile.png")
    given = [row | {"images": ["tile.png"]} for row in rows(4)]
    with open(tmp_path / "in.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in given)
    rollouts = from_files(tmp_path / "in.jsonl")
    plan = Plan(format="visualprm-raw")
    data, _ = annotate_rollouts(rollouts, policy, tmp_path / "raw" / "AI2D.jsonl", plan, checker="exact")
    records = [json.loads(line) for line in open(tmp_path / "raw" / "AI2D.jsonl")]
    keys = ["image", "question", "question_orig", "answer", "response", "steps_with_score", "num_mc_sequences"]
    assert [name for name in records[0] if name != "source"] == keys
    assert records[0]["question"] == "<image>\nquestion 0?" and records[0]["image"] == "tile.png"
    assert set(records[0]["steps_with_score"][0]) == {"step", "score", "num_mc_correct", "num_mc_total"}
    again = load_rollouts(tmp_path / "raw" / "AI2D.jsonl", image_root=tmp_path)
    for name in ("prompt", "completions", "mc_scores", "mc_counts", "mc_total"):
        assert again[name][:] == data[name][:], name
    # and raw records are themselves an input
    once_more = from_files(tmp_path / "raw" / "AI2D.jsonl", tmp_path)
    assert [rollout.steps for rollout in once_more] == [rollout.steps for rollout in rollouts]


def test_questions_are_solved_first(tmp_path):
    def solver(images, prompt, steps, n, seed):
        if steps:
            return policy(images, prompt, steps, n, seed)
        texts = ["Think 0.9\n\nThen 0.5\n\nAnswer: 1", "   ", *(f"One 0.{i}\n\nAnswer: 0" for i in range(n - 2))]
        return texts[:n]

    question = {"prompt": "How many?", "answer": "1", "source": "q", "rollout_id": "q:7"}
    data = annotate([question], solver, checker="exact", n=4, solutions=3, output=tmp_path / "a.jsonl")
    assert data["rollout_id"] == ["q:7:0", "q:7:2"]
    assert data["completions"][0] == ["Think 0.9", "Then 0.5", "Answer: 1"]
    assert json.loads((tmp_path / "a.annotation.json").read_text())["lost_solutions"] == {"solution_empty": 1}


class Moody(Policy):
    """Cuts off every fifth draw of step 0, and does not answer at all for one row while it sulks."""

    name = "moody"

    def __init__(self, sulks: bool):
        self.sulks, self.asked = sulks, 0

    def run(self, visits):
        for place, visit in reversed(list(enumerate(visits))):
            for number, request in enumerate(visit):
                self.asked += request.n
                if self.sulks and "question 3?" in request.prompt:
                    yield place, number, Parked("503 Service Unavailable")
                    continue
                texts = policy(request.images, request.prompt, request.steps, request.n, request.seed)
                cut = [len(request.steps) == 1 and i % 5 == 4 for i in range(request.n)]
                yield (
                    place,
                    number,
                    Reply([Draw(t, "length" if c else STOP, 7) for t, c in zip(texts, cut, strict=True)]),
                )


def test_lost_draws_are_not_measured_and_parked_ones_are_finished_by_the_next_run(tmp_path):
    output = tmp_path / "a.jsonl"
    with pytest.raises(OSError, match="[34] requests without an answer.*503 Service.*run again"):
        annotate(rows(6), first := Moody(True), checker="exact", n=10, output=output)
    assert not output.exists()
    annotate(rows(6), second := Moody(False), checker="exact", n=10, output=output)
    total = sum(10 * (len(row["completions"]) - 1) for row in rows(6))
    asked_in_vain = 10 * (len(rows(6)[3]["completions"]) - 1)
    assert first.asked == total and second.asked == asked_in_vain
    annotate(rows(6), Moody(False), checker="exact", n=10, output=tmp_path / "b.jsonl")
    assert output.read_text() == (tmp_path / "b.jsonl").read_text()
    lines = [json.loads(line) for line in open(output)]
    assert all(row["mc_total"][0] == 8 and set(row["mc_total"][1:]) == {10} for row in lines)
    assert load_rollouts(output)["mc_total"][:] == [None] * 6
    assert load_rollouts(output)["mc_scores"][:] == [row["mc_scores"] for row in lines]


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[2])
from test_annotate import annotate, policy, rows
def slow(images, prompt, steps, n, seed):
    time.sleep(0.01)
    return policy(images, prompt, steps, n, seed)
slow.__name__ = "policy"
annotate(rows(40), slow, checker="exact", budget="bis", fraction=0.2, output=sys.argv[1] + "/a.jsonl")
"""


def test_killed_run_is_finished_by_the_next_one_and_pays_for_no_draw_twice(tmp_path):
    options = {"checker": "exact", "budget": "bis", "fraction": 0.2}
    annotate(rows(40), policy, output=tmp_path / "whole.jsonl", **options)
    whole = (tmp_path / "whole.draws.jsonl").read_bytes()
    draws = tmp_path / "a.draws.jsonl"
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as run:
        while run.poll() is None and (not draws.exists() or draws.stat().st_size < len(whole) / 3):
            time.sleep(0.01)
        run.send_signal(signal.SIGKILL)
    assert len(whole) / 3 <= draws.stat().st_size < len(whole)
    with open(draws, "ab") as file:
        file.write(b'{"rollout": "a:0", "row"')  # as a kill in the middle of a write leaves it
    annotate(rows(40), policy, output=tmp_path / "a.jsonl", **options)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert draws.read_bytes() == whole


def test_draws_do_not_hang_on_the_order_of_rows(tmp_path):
    annotate(rows(10), policy, checker="exact", n=4, output=tmp_path / "a.jsonl")
    annotate(rows(10)[::-1], policy, checker="exact", n=4, output=tmp_path / "b.jsonl")
    assert sorted(open(tmp_path / "a.jsonl")) == sorted(open(tmp_path / "b.jsonl"))


def test_pictures_in_memory_go_into_parquet(tmp_path):
    data = Dataset.from_list([row | {"images": [picture("red")]} for row in rows(2)])
    made = annotate(data, policy, checker="exact", n=2, output=tmp_path / "a.parquet")
    assert made[0]["images"][0].size == (56, 56)
    assert load_rollouts(tmp_path / "a.parquet")[1]["images"][0].size == (56, 56)


def stern(images, prompt, steps, n, seed):
    return ["Answer: 1" if float(steps[-1].split()[-1]) > 0.8 else "Answer: 0"] * n


def test_second_policy_adds_agreement_and_rules_read_the_columns(tmp_path, capsys):
    file = tmp_path / "a.jsonl"
    data = annotate(rows(30), policy, second=stern, checker="exact", n=8, output=file)
    for row in data:
        *steps, _ = row["completions"]
        good = [float(step.split()[-1]) > 0.8 for step in steps]
        assert row["agreement"] == [*(float((s > 0) == g) for s, g in zip(row["mc_scores"], good, strict=False)), 1.0]
        assert row["self_confidence"] == float(row["completions"][-1] == "Answer: 1")
    assert (tmp_path / "a.second.draws.jsonl").exists()
    assert json.loads((tmp_path / "a.annotation.json").read_text())["second"] == "stern"
    scored = {row["rollout_id"]: row for row in data}
    select_files(file, tmp_path / "agreed.jsonl", "agreement", fraction=0.3)
    kept = [json.loads(line)["rollout_id"] for line in open(tmp_path / "agreed.jsonl")]
    shares = {name: np.mean(row["agreement"]) for name, row in scored.items()}
    for source in "ab":
        mine = [name for name in shares if name[0] == source]
        assert {name for name in kept if name[0] == source} == set(
            sorted(mine, key=lambda name: (-shares[name], mine.index(name)))[: int(len(mine) * 0.3)]
        )
    select_files(file, tmp_path / "confident.jsonl", "self_confidence", fraction=0.2)
    for line in open(tmp_path / "confident.jsonl"):
        row = json.loads(line)
        assert row["self_confidence"] == 1.0 and min(row["mc_scores"]) > 0
    assert main(["select", str(file), "--compare"]) == 0
    shown = capsys.readouterr().out
    assert "agreement" in shown and "self_confidence" in shown


def test_second_opinion_of_a_process_reward_model(tmp_path, tiny_folders):
    from trl_mprm import ProcessRewardModel
    from trl_mprm.models.loading import add_marker, load_model, load_processing_class
    from trl_mprm.prompting.step_format import StepFormat

    model, tokenizer = load_model(tiny_folders["qwen2"]), load_processing_class(tiny_folders["qwen2"], False)
    add_marker(model, tokenizer, StepFormat())
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "prm")
    StepFormat().save(tmp_path / "prm")
    data = annotate(rows(2), policy, second=str(tmp_path / "prm"), checker="exact", n=2, output=tmp_path / "a.jsonl")
    judge = ProcessRewardModel.from_pretrained(tmp_path / "prm")
    for row in data:
        scores = judge.score([], row["prompt"], row["completions"])
        assert row["agreement"] == [float((m > 0) == (s > 0.5)) for m, s in zip(row["mc_scores"], scores, strict=True)]


class Endless(Moody):
    def run(self, visits):
        for place, number, reply in super().run(visits):
            yield place, number, Reply([draw._replace(finish="length") for draw in reply.draws])


def test_nothing_measured_names_what_became_of_the_draws(tmp_path):
    with pytest.raises(ValueError, match="not one step was measured .76 length.: .*raise max_new_tokens"):
        annotate(rows(6, answer_step=False), Endless(False), checker="exact", n=4, output=tmp_path / "a.jsonl")
    assert not (tmp_path / "a.jsonl").exists()


def raising(*arguments):
    raise RuntimeError("no judge today")


@pytest.mark.parametrize(
    "change, options, message",
    [
        ({"answer": None}, {}, "row 1: `answer` is None, expected the right answer"),
        ({"prompt": ""}, {}, "row 1: .*: correct or remove the row"),
        ({"completions": ["a", ""]}, {}, "row 1: step 1 is ''"),
        ({"rollout_id": "a:0"}, {}, "'a:0' occurs twice"),
        ({}, {"n": 0}, "n must be a whole number of at least 1, got 0"),
        (
            {},
            {"checker": raising},
            "row a:0: the checker raised RuntimeError .no judge today.*the draws so far are kept",
        ),
        ({}, {"checker": "spelling"}, "checker must be one of math, exact, choice, numeric, or a callable"),
        ({}, {"policy": raising}, "row a:0, step 0: the policy raised RuntimeError"),
        ({}, {"policy": lambda *arguments: ["one"]}, "expected a list of 16 texts"),
        ({}, {"budget": "most"}, "budget must be one of all, bis"),
        ({}, {"format": "visualprm-raw", "output": "a.parquet"}, "output must be"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_output(tmp_path, change, options, message):
    given = [rows(2)[0], rows(2)[1] | change]
    options = {"policy": policy, "checker": "exact", "output": "a.jsonl"} | options
    output = tmp_path / options.pop("output")
    with pytest.raises(ValueError, match=message) as caught:
        annotate(given, options.pop("policy"), output=output, **options)
    assert "\n" not in str(caught.value)
    assert not output.exists()


def test_other_settings_do_not_mix_with_draws_that_are_there(tmp_path):
    annotate(rows(2), policy, checker="exact", n=2, output=tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="holds draws of other settings .seed 0, now 1"):
        annotate(rows(2), policy, checker="exact", n=2, seed=1, output=tmp_path / "a.jsonl")
    more = annotate(rows(2), policy, checker="exact", n=4, output=tmp_path / "a.jsonl")
    assert set(more["mc_total"]) == {4}
    assert len(open(tmp_path / "a.draws.jsonl").readlines()) == 1 + 2 * sum(len(r["completions"]) - 1 for r in rows(2))


def test_command_line_names_the_file_and_the_line(tmp_path, capsys):
    lines = [json.dumps(rows(1)[0]), json.dumps(rows(1)[0] | {"images": ["gone.png"], "rollout_id": "x"})]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    command = ["annotate", str(tmp_path / "in.jsonl"), "--policy", "no/such", "--output", str(tmp_path / "out.jsonl")]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "in.jsonl:2: 'gone.png' is not in" in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
