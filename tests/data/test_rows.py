"""One definition of a usable step and of the same question, whoever reads them."""

import io
import json
import pickle

import pytest
from datasets import Dataset
from PIL import Image as PILImage

from trl_mprm.data.formats import to_row
from trl_mprm.data.rows import Reason, Refused, check_row, check_steps, question_key
from trl_mprm.evaluation.benchmarks import read_benchmark
from trl_mprm.selection.lines import group_hash
from trl_mprm.training.checks import check_dataset
from trl_mprm.training.sampling import prompt_groups


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


def test_the_same_question_is_the_same_to_selection_training_and_scoring(tmp_path):
    """Prompt and pictures: bytes before a path that came with them, since files of one name may lie in many folders."""
    red, blue = (PILImage.new("RGB", (2, 2), color) for color in ("red", "blue"))
    data = [(file := io.BytesIO(), picture.save(file, "png"))[0].getvalue() for picture in (red, blue)]
    stored = [{"path": "1.png", "bytes": each} for each in data]
    questions = [("q", []), ("q", [stored[0]]), ("q", [stored[1]]), ("p", [stored[0]]), ("q", stored), ("q", [])]
    keys = [question_key(prompt, images) for prompt, images in questions]
    assert len(set(keys)) == 5 and keys[0] == keys[-1]
    assert len({group_hash("x", prompt, images) for prompt, images in questions}) == 5
    rows = Dataset.from_list([{"prompt": prompt, "images": images} for prompt, images in questions])
    assert prompt_groups(rows) == [[0, 5], [1], [2], [3], [4]]
    # pictures in memory count by their pixels and their shape; equal in both is the same
    assert question_key("q", [red]) == question_key("q", [red.copy()]) != question_key("q", [blue])
    assert question_key("q", [red]) != question_key("q", [red.resize((4, 1))])
    chat = [{"role": "user", "content": "q"}]
    assert question_key(chat) == question_key(list(chat)) != question_key("q")
