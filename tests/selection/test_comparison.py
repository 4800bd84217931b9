"""The paper's Table 1: each column against the kept rows themselves, counted plainly; and against the paper's definitions."""

import json
import random

import numpy as np
import pytest

from trl_mprm.cli import main
from trl_mprm.data.shards import plan_shards
from trl_mprm.selection.comparison import METRICS, compare_rules, comparison_table
from trl_mprm.selection.files import select_files
from trl_mprm.selection.rules import STEP_RULES


def write_corpus(folder, seed: int = 0, n: int = 150) -> None:
    """Three sources, a tenth of the rollouts mixed, four to a question, some rows refused, some steps not measured."""
    rng = random.Random(seed)
    folder.mkdir()
    for source in ("AI2D", "GEOS", "UniGeo"):
        with open(folder / f"{source}.jsonl", "w") as file:
            for number in range(n):
                counts = [rng.choice((4, 16, 16, 16)) for _ in range(rng.randint(1, 6))]
                if rng.random() < 0.1:
                    counts[-1] = 0
                steps = [
                    {
                        "step": "word " * rng.randint(1, 9),
                        "score": count / 16,
                        "num_mc_correct": count,
                        "num_mc_total": 16,
                    }
                    for count in counts
                ]
                if number % 40 == 7:
                    steps[0]["score"] = "0.5"
                if number % 30 == 11:
                    steps.append({"step": "never asked for", "score": 0.0, "num_mc_correct": 0, "num_mc_total": 0})
                file.write(json.dumps({"question": f"{source} {number // 4}?", "steps_with_score": steps}) + "\n")


def describe_plainly(folder) -> dict:
    """Table 1 of the rows of a folder, row by row."""
    rows = [(path.name, json.loads(line)) for path in sorted(folder.glob("*.jsonl")) for line in open(path)]
    rows = [(source, row) for source, row in rows if "steps_with_score" in row]  # not refused.jsonl
    rows = [(source, row) for source, row in rows if row["steps_with_score"][0]["score"] != "0.5"]
    steps = [[step for step in row["steps_with_score"] if step["num_mc_total"]] for _, row in rows]
    scores = [[step["score"] for step in some] for some in steps]
    flat = [score for some in scores for score in some]
    words = [len(step["step"].split()) for some in steps for step in some]
    return {
        "rollouts": len(rows),
        "steps": len(flat),
        "steps_per_rollout": len(flat) / len(rows),
        "words_per_step": np.mean(words),
        "error_step_share": np.mean(np.array(flat) == 0),
        "mean_mc": np.mean(flat),
        "mixed_share": np.mean([0 < sum(score > 0 for score in some) < len(some) for some in scores]),
        "all_wrong_share": np.mean([not any(some) for some in scores]),
        "mean_group_size": len(rows) / len({(source, row["question"]) for source, row in rows}),
    }


@pytest.mark.parametrize("ties, by", [("first", "source"), ("hash", "corpus")])
def test_each_column_describes_what_the_rule_keeps(tmp_path, monkeypatch, ties, by):
    write_corpus(tmp_path / "in")
    monkeypatch.setattr("trl_mprm.selection.comparison.plan_shards", lambda inputs: plan_shards(inputs, 4000))
    parameters = {"fraction": 0.25, "alpha": 0.05, "ties": ties, "seed": 5, "by": by}
    table = compare_rules(tmp_path / "in", **parameters)
    assert list(table) == ["full data", *STEP_RULES]
    assert table["full data"] == pytest.approx(describe_plainly(tmp_path / "in"))
    for rule in STEP_RULES:
        select_files(tmp_path / "in", tmp_path / rule, rule, **parameters)
        assert table[rule] == pytest.approx(describe_plainly(tmp_path / rule))


def test_the_rules_differ_as_in_the_paper(tmp_path):
    """Table 1: mixed and low-MC subsets have three times the error steps of the rest, and a random one those of all."""
    write_corpus(tmp_path / "in", n=600)
    table = compare_rules(tmp_path / "in", fraction=0.25, alpha=0.05)
    error, mc = ({name: column[key] for name, column in table.items()} for key in ("error_step_share", "mean_mc"))
    assert error["mixed"] > 2 * error["full data"] and error["low_mc"] > 2 * error["full data"]
    assert error["random"] == pytest.approx(error["full data"], rel=0.35)
    assert mc["low_mc"] < mc["mixed"] < mc["full data"] < mc["reliable"]
    assert table["bis"]["mixed_share"] > 3 * table["full data"]["mixed_share"]
    assert len({column["rollouts"] for name, column in table.items() if name != "full data"}) == 1


def test_compare_prints_and_writes_nothing(tmp_path, capsys):
    write_corpus(tmp_path / "in", n=20)
    assert main(["select", str(tmp_path / "in"), "--compare", "--fraction", "0.25"]) == 0
    printed = capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    table = comparison_table(compare_rules(tmp_path / "in", fraction=0.25))
    assert [line.split()[0] for line in printed.splitlines()[2:-1]] == [label.split()[0] for label in METRICS]
    for row in table:
        assert any(line.split()[-len(STEP_RULES) :] == row[-len(STEP_RULES) :] for line in printed.splitlines())
    assert main(["select", str(tmp_path / "in")]) == 2
    assert "expected --output" in capsys.readouterr().err


def test_nothing_to_compare(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("{}\n")
    assert main(["select", str(tmp_path / "a.jsonl"), "--compare"]) == 2
    assert "no row can be used" in capsys.readouterr().err
