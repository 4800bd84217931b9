"""One definition of a usable step, whoever reads it."""

import json
import pickle

import pytest
from datasets import Dataset

from trl_mprm.data.formats import to_row
from trl_mprm.data.rows import Reason, Refused, check_row, check_steps
from trl_mprm.evaluation.benchmarks import read_benchmark
from trl_mprm.training.checks import check_dataset


# White space is what Python's `strip` takes away.
BLANK = ["", " \n", "\x1c", "\u2003", "\x85"]

TEXT = ["a", "数", " . ", "\u200b"]


def row(step):
    return {"prompt": "1 + 1?", "completions": ["It is 2.", step], "labels": [1.0, 0.0]}


@pytest.mark.parametrize("step", BLANK)
def test_a_blank_step_is_refused_by_every_reader(tmp_path, step):
    with pytest.raises(Refused) as refused:
        check_steps([step])
    assert refused.value.reason is Reason.STEP_WITHOUT_TEXT
    with pytest.raises(Refused, match="expected text"):
        to_row(row(step))
    with pytest.raises(Refused, match="row 7: step 1 is .* expected text"):
        check_row(row(step), "row 7")
    with pytest.raises(ValueError, match="train_dataset, row 1: step 1 is .* expected text"):
        check_dataset(Dataset.from_list([row("a"), row(step)]), "train_dataset")
    line = {"question": "?", "candidates": [{"steps": ["a", step], "correct": True}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    with pytest.raises(ValueError, match="step_without_text, candidate 0: step 1 is"):
        read_benchmark(tmp_path / "a.jsonl", name="best-of-n")


def test_whatever_is_not_blank_is_text():
    check_steps(TEXT)
    check_dataset(Dataset.from_list([row(step) for step in TEXT]), "train_dataset")


def test_a_refusal_travels_between_processes():
    refused = pickle.loads(pickle.dumps(Refused(Reason.IMAGE_MISSING, "'a.png' is not there")))
    assert (refused.reason, str(refused)) == (Reason.IMAGE_MISSING, "'a.png' is not there")
