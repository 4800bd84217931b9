"""Every published layout of step annotations, as its makers write it, becomes the same row; what is unknown is refused."""

import json

import datasets
import pytest
from datasets import load_dataset

from trl_mprm import load_rollouts
from trl_mprm.data.formats import states_answer, to_row
from trl_mprm.data.rows import Reason, Refused
from trl_mprm.selection.files import select_files


STEPS = ["Count them.", "There are 3."]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def conversation(labels, **fields):
    text = "Question: How many?\nProcess: " + "\n\n".join(f"{step}<prm>" for step in STEPS)
    return {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": labels}]} | fields


def chat(marks, question="### Question:\n<image>\nHow many?\n\n### Solution Process:\n"):
    turns = [{"from": "system", "value": "You judge steps."}]
    for step, mark in zip([question + STEPS[0], STEPS[1]], marks, strict=True):
        turns += [{"from": "human", "value": step}, {"from": "gpt", "value": mark}]
    return {"id": -1, "conversations": turns}


def prm800k(*steps):
    return {"labeler": "x", "question": {"problem": "How many?"}, "label": {"steps": list(steps)}}


def rated(rating, text, chosen=0, **fields):
    candidates = [{"text": text, "rating": rating, "flagged": False}, {"text": "Other.", "rating": 1}]
    return {"completions": candidates, "human_completion": None, "chosen_completion": chosen} | fields


def raw(total):
    """Raw annotations whose second step has that `num_mc_total`."""
    steps = [
        {"step": STEPS[0], "score": 1.0, "num_mc_total": 16},
        {"step": STEPS[1], "score": 0.0, "num_mc_total": total},
    ]
    return {"question": "How many?", "steps_with_score": steps}


FORMATS = {
    "visualprm400k_v1_1_raw": {
        "question": "<image>\nAnswer: How many?",
        "question_orig": "How many?",
        "steps_with_score": [
            {"step": STEPS[0], "score": 1.0, "num_mc_correct": 16, "num_mc_total": 16},
            {"step": STEPS[1], "score": 0.0, "num_mc_correct": 0, "num_mc_total": 16},
        ],
    },
    "trl": {"prompt": "How many?", "completions": STEPS, "labels": [True, False]},
    "mm_prm": conversation([1.0, 0.0]),
    "bis_paper": {"image": None} | conversation([1, 0]),
    "beta_binomial_prm": conversation([1.0, 0.0], prm_counts={"k": [16, 0], "n": [16, 16]}),
    "visualprm400k_v1_1": chat("+-"),
    "math_shepherd": {
        "input": "How many? Step 1: Count them. ки\nStep 2: There are 3. ки",
        "label": "How many? Step 1: Count them. +\nStep 2: There are 3. -",
        "task": "GSM8K",
    },
    "ursa": {
        "image_url": None,
        "instruction": "You are given a problem and a step-by-step solution.\nQuestion:How many?\nStep 1: Count them. "
        "Step 2: There are 3.\n†Answer: 3",
        "output": "You are given a problem and a step-by-step solution.\nQuestion:How many?\nStep 1: Count them. + "
        "Step 2: There are 3. -\n†Answer: 3",
    },
    "prm800k": prm800k(rated(1, STEPS[0]), rated(-1, STEPS[1], chosen=None)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_row(name):
    row = to_row(FORMATS[name])
    numbered = name in ("math_shepherd", "ursa")
    assert row["prompt"] == "How many?"
    assert row["completions"] == [f"Step {i + 1}: {step}" if numbered else step for i, step in enumerate(STEPS)]
    assert row["labels"] == row["mc_scores"] == [1.0, 0.0]
    if name in ("visualprm400k_v1_1_raw", "beta_binomial_prm"):
        assert (row["mc_counts"], row["mc_total"]) == ([16, 0], 16)
    else:
        assert (row["mc_counts"], row["mc_total"]) == ([None, None], None)


def test_every_format_loads_from_one_file_and_is_selected_byte_by_byte(tmp_path):
    lines = [json.dumps(record) for record in FORMATS.values()]
    (tmp_path / "all.jsonl").write_text("\n".join(lines))
    assert len(load_rollouts(tmp_path)) == len(FORMATS)
    select_files(tmp_path / "all.jsonl", tmp_path / "kept.jsonl", fraction=1.0)
    assert (tmp_path / "kept.jsonl").read_text() == "".join(line + "\n" for line in lines)
    report = select_files(tmp_path / "all.jsonl", tmp_path / "out" / "kept.parquet", fraction=1.0)
    assert report["total"]["kept"] == len(FORMATS)
    again = load_rollouts(tmp_path / "out" / "kept.parquet")
    assert again["completions"][:] == load_rollouts(tmp_path / "all.jsonl")["completions"][:]
    # and by the datasets library alone
    rows = load_dataset("parquet", data_files=str(tmp_path / "out" / "kept.parquet"), split="train")
    assert rows["labels"][:] == [[1.0, 0.0]] * len(FORMATS)


@pytest.mark.parametrize(
    ("record", "labels"),
    [
        (conversation([0.5, 0.0], prm_counts={"k": [8, 0], "n": [16, 0]}), [0.5, -100.0]),
        (conversation([0.5, 0.0], prm_counts={"k": [8, 0], "n": [16, "0"]}), [0.5, -100.0]),
        (raw("0"), [1.0, -100.0]),
        (raw(0.0), [1.0, -100.0]),
        (raw(False), [1.0, -100.0]),
        (raw("16"), [1.0, 0.0]),
        (raw(None), [1.0, 0.0]),
        (prm800k(rated(0, "a"), rated(None, "b"), rated(1, "c")), [-100.0, -100.0, 1.0]),
        (prm800k(rated(-1, "a"), rated(1, "b", chosen=None, human_completion={"text": "c"})), [0.0, -100.0]),
    ],
)
def test_steps_that_nobody_judged_have_no_label(record, labels):
    assert to_row(record)["labels"] == labels


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "Step 1: a +"}, "unknown_format"),
        ({}, "unknown_format"),
        ({"messages": [{"role": "user", "content": "q"}]}, "unknown_format"),
        (chat("+-", question="How many?\n"), "unknown_format"),
        ({"conversations": chat("+-")["conversations"][1:] + [{"from": "gpt", "value": "+"}]}, "unknown_format"),
        ({"conversations": []}, "empty_steps"),
        ({"conversations": "text"}, "empty_steps"),
        (chat(["+", "maybe"]), "score_not_a_number"),
        (chat(["+", None]), "step_without_score"),
        ({"conversations": chat("+-")["conversations"][:-1]}, "labels_not_one_a_step"),
        (conversation([1.0]), "labels_not_one_a_step"),
        (conversation([1.0, None]), "step_without_score"),
        (conversation([1.0, 0.0], prm_counts={"k": [1], "n": [16]}), "labels_not_one_a_step"),
        (conversation([1.0, 0.0], prm_counts=[16, 16]), "labels_not_one_a_step"),
        ({"conversations": [{"from": "gpt", "value": [1.0]}]}, "prompt_missing"),
        ({"input": "q Step 1: a ки", "label": "q Step 1: a ки"}, "step_without_score"),
        ({"input": "q", "label": "q"}, "empty_steps"),
        (FORMATS["trl"] | {"mc_total": 0}, "nothing_measured"),
        (FORMATS["trl"] | {"mc_scores": [1.0, 0.0], "mc_total": "0"}, "nothing_measured"),
        (prm800k(), "empty_steps"),
        (prm800k({"completions": [], "human_completion": None, "chosen_completion": None}), "step_without_text"),
        (prm800k(rated(1, "a", chosen=7)), "step_without_text"),
        (prm800k(rated("good", "a")), "score_not_a_number"),
        ({"question": {"problem": None}, "label": prm800k(rated(1, "a"))["label"]}, "prompt_missing"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(record, reason):
    with pytest.raises(Refused) as refused:
        to_row(record)
    assert refused.value.reason is Reason(reason)


def test_the_answer_step_is_left_out_on_request(tmp_path):
    answer = {"prompt": "1 + 1?", "completions": ["1 + 1 is 2.", "Final answer: 2"], "labels": [0.25, 1.0]}
    plain = answer | {"completions": ["1 + 1 is 2.", "So it is 2."]}
    assert to_row(answer)["labels"] == [0.25, 1.0]
    assert to_row(answer, drop_answer_step=True)["mc_scores"] == [0.25, None]
    assert to_row(plain, drop_answer_step=True)["mc_scores"] == [0.25, 1.0]
    with pytest.raises(Refused, match="nothing_measured"):
        to_row({"prompt": "1 + 1?", "completions": ["The answer is 2."], "labels": [1]}, drop_answer_step=True)
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(answer)}\n{json.dumps(plain)}\n")
    assert load_rollouts(tmp_path / "a.jsonl", drop_answer_step=True)["labels"][:] == [[0.25, -100.0], [0.25, 1.0]]
    report = select_files(tmp_path / "a.jsonl", tmp_path / "o.jsonl", "low_mc", fraction=0.5, drop_answer_step=True)
    assert (tmp_path / "o.jsonl").read_text() == f"{json.dumps(answer)}\n"
    assert report["total"]["mean_mc"] == 0.25 and report["drop_answer_step"] is True


@pytest.mark.parametrize(
    "step", ["Final answer: 5", "So the answer is 5.", "Answer: (B)", "\\boxed{5}", "FINAL ANSWER 5"]
)
def test_steps_that_state_the_answer(step):
    assert states_answer(step)


@pytest.mark.parametrize("step", ["We answer in two parts.", "boxed in by walls", "x = 5", "The final value is 5"])
def test_steps_that_do_not(step):
    assert not states_answer(step)
