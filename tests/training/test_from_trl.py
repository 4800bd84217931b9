"""
What TRL 1.13's `PRMTrainer` did, done with `ProcessRewardConfig` and `ProcessRewardTrainer` in place of its classes.

Written from what its own tests look at; golden numbers are those of `golden/trl_1_13_prm.json`.
"""

import dataclasses
import json
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from golden.make_trl_1_13_prm import GOLDEN, ROWS, tiny_classifier
from peft import LoraConfig
from transformers import AutoModelForTokenClassification, EvalPrediction, Qwen2Config, TrainingArguments

from trl_mprm import ProcessRewardConfig, ProcessRewardTrainer
from trl_mprm.cli import main
from trl_mprm.models.tiny import tiny_tokenizer
from trl_mprm.training.from_trl import compute_accuracy


CASES = json.loads(GOLDEN.read_text())["cases"]
TOKENIZE = {"step_separator": "\n", "max_length": None, "max_completion_length": None}
TOKENIZE |= {"train_on_last_step_only": False, "is_eval": False}


def trainer_for(tmp_path, rows=ROWS, *, trainer=None, tokenizer=None, model=None, **settings) -> ProcessRewardTrainer:
    tokenizer = tokenizer or tiny_tokenizer("qwen2")
    settings = {"report_to": "none", "use_cpu": True, "max_steps": 2, "save_strategy": "no", **settings}
    return ProcessRewardTrainer(
        model=model or tiny_classifier(tokenizer),
        args=ProcessRewardConfig(output_dir=str(tmp_path), **settings),
        processing_class=tokenizer,
        train_dataset=rows if isinstance(rows, Dataset) else Dataset.from_list(rows),
        **(trainer or {}),
    )


def tokenize(row, **changes) -> dict:
    return ProcessRewardTrainer.tokenize_row(row, tiny_tokenizer("qwen2"), **TOKENIZE | changes)


# ---- tokens and labels


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['step_separator']!r}-{len(case)}")
def test_tokens_and_labels(case):
    """No truncation, a separator of several tokens, the last step only, a first token, both truncations."""
    tokenizer = tiny_tokenizer("qwen2")
    if "bos_token" in case:
        tokenizer.bos_token = case["bos_token"]
    how = {name: case.get(name, default) for name, default in TOKENIZE.items()}
    rows = [ProcessRewardTrainer.tokenize_row(row, tokenizer, **how) for row in ROWS]
    assert [row["input_ids"] for row in rows] == case["input_ids"]
    assert [row["labels"] for row in rows] == case["labels"]


def test_an_evaluation_keeps_all_steps():
    last = tokenize(ROWS[0], train_on_last_step_only=True)
    assert [label for label in last["labels"] if label != -100] == [0]
    assert tokenize(ROWS[0], train_on_last_step_only=True, is_eval=True) == tokenize(ROWS[0])


def test_the_completion_is_cut_before_the_whole():
    """Prompt 4 tokens, steps 4 and 5 with their separators."""
    whole = tokenize(ROWS[0])
    assert len(whole["input_ids"]) == 13
    cut = tokenize(ROWS[0], max_completion_length=6, max_length=9)
    assert cut == {name: values[:9] for name, values in whole.items()}
    assert tokenize(ROWS[0], max_completion_length=3)["labels"] == [-100] * 7


# ---- accuracy


def test_accuracy_of_token_classes():
    logits = np.array([[[0.1, 0.9], [0.8, 0.2]], [[0.3, 0.7], [0.6, 0.4]]])
    assert compute_accuracy(EvalPrediction(logits, np.array([[1, 0], [1, 1]]))) == {"accuracy": 0.75}
    assert compute_accuracy((logits, np.array([[1, -100], [0, -100]]))) == {"accuracy": 0.5}


def test_accuracy_of_pairs_of_rewards(caplog):
    rewards, better = np.array([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]]), np.array([0, 0, 0])
    assert compute_accuracy(EvalPrediction(rewards, better)) == {"accuracy": 0.5}
    assert "1 out of 3 pairs have equal rewards" in caplog.text


def test_the_best_model_by_accuracy(tmp_path):
    trainer = trainer_for(
        tmp_path,
        trainer={"eval_dataset": Dataset.from_list(ROWS)},
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        learning_rate=1e-3,
    )
    trainer.train()
    accuracies = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert len(accuracies) == 2 and trainer.state.best_metric == max(accuracies)
    batch = trainer.data_collator(ROWS)
    with torch.no_grad():
        logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = compute_accuracy((logits.numpy(), batch["labels"].numpy()))["accuracy"]
    assert trainer.evaluate()["eval_accuracy"] == pytest.approx(expected)


def test_accuracy_may_be_asked_for(tmp_path):
    named = {"eval_dataset": Dataset.from_list(ROWS), "compute_metrics": compute_accuracy}
    first = trainer_for(tmp_path, trainer=named).evaluate()["eval_accuracy"]
    assert first == trainer_for(tmp_path, trainer=named | {"compute_metrics": None}).evaluate()["eval_accuracy"]


# ---- configuration and command


def test_the_table_of_defaults_is_that_of_the_classes(tmp_path):
    golden = json.loads(GOLDEN.with_name("trl_1_13_prm_config.json").read_text())["defaults"]
    theirs, ours = (
        _defaults(config(str(tmp_path), use_cpu=True)) for config in (TrainingArguments, ProcessRewardConfig)
    )
    theirs |= golden
    differ = {name: (theirs[name], ours[name]) for name in theirs if theirs[name] != ours[name]}
    guide = (Path(__file__).parents[2] / "recipes" / "migrate_from_trl.md").read_text(encoding="utf-8")
    table = guide.partition("| field | TRL 1.13 | here | why |")[2].partition("\n\n")[0]
    cells = [line.split("|")[1:5] for line in table.splitlines()[2:]]
    told = {field.strip(" `"): tuple(json.loads(value.strip(" `")) for value in values) for field, *values, _ in cells}
    assert told == differ and all(why.strip() for *_, why in cells)


def _defaults(config: TrainingArguments) -> dict:
    """The fields as they are used: some are None until the configuration is made."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.init}
    return {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}


def test_the_command_takes_the_flags_of_prm_py(tmp_path, capsys):
    tokenizer = tiny_tokenizer("qwen2")
    tiny_classifier(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = Dataset.from_list(ROWS)
    DatasetDict({"learn": rows, "look": rows.select([0, 1])}).save_to_disk(str(tmp_path / "data"))
    argv = {
        "model_name_or_path": tmp_path / "model",
        "dataset_name": tmp_path / "data",
        "output_dir": tmp_path / "out",
    }
    argv |= {"dataset_train_split": "learn", "dataset_test_split": "look", "dataset_num_proc": 1, "max_steps": 1}
    argv |= {"eval_strategy": "steps", "eval_steps": 1, "step_separator": "\n", "max_length": 64, "report_to": "none"}
    words = [word for name, value in argv.items() for word in (f"--{name}", str(value))]
    assert main(["train", *words, "--use_cpu", "--train_on_last_step_only"]) == 0
    assert "rollouts: all 4, no selection" in capsys.readouterr().out
    assert AutoModelForTokenClassification.from_pretrained(tmp_path / "out").config.num_labels == 2


# ---- training


@pytest.mark.parametrize("last_only", [False, True])
def test_training_moves_every_weight(last_only, tmp_path):
    trainer = trainer_for(tmp_path, train_on_last_step_only=last_only, learning_rate=1e-2, weight_decay=0.0)
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] > 0
    assert trainer.args.reward_head == "classification"
    assert all((weight != before[name]).any() for name, weight in trainer.model.named_parameters())


def test_the_last_step_only_is_trained_and_all_are_evaluated(tmp_path):
    rows = Dataset.from_list(ROWS)
    trainer = trainer_for(
        tmp_path, rows, trainer={"eval_dataset": rows}, train_on_last_step_only=True, dataset_num_proc=2
    )
    labelled = [(trainer.data_collator([row])["labels"] != -100).sum().item() for row in trainer.train_dataset]
    assert labelled == [1] * len(ROWS)
    assert trainer.train_dataset[0]["labels"] == [-100.0, 0.0]  # a column of booleans made True of -100
    assert [row["labels"] for row in trainer.eval_dataset] == [row["labels"] for row in ROWS]


def test_pretokenized_rows(tmp_path):
    """The same loss, accuracy and weights as from the rows that they were made of."""
    pretokenized = Dataset.from_list([tokenize(row) for row in ROWS])
    results = []
    for rows in (Dataset.from_list(ROWS), pretokenized):
        trainer = trainer_for(tmp_path, rows, trainer={"eval_dataset": rows}, learning_rate=1e-3)
        trainer.train()
        metrics = trainer.evaluate()
        results.append([metrics["eval_loss"], metrics["eval_accuracy"], trainer.model.score.weight.sum().item()])
    assert results[0] == pytest.approx(results[1], abs=1e-6)
    broken = Dataset.from_list([{"input_ids": [1, 2], "labels": [1]}])
    with pytest.raises(ValueError, match="row 0.*: 2 input_ids and 1 labels, expected one label per token"):
        trainer_for(tmp_path, broken).train()


@pytest.mark.parametrize("limits", [{"max_length": 12}, {"max_completion_length": 9}])
def test_rows_are_cut(limits, tmp_path):
    """What is left is what TRL left, and the loss is that of its tokens."""
    trainer = trainer_for(tmp_path, **limits)
    batch = trainer.data_collator(ROWS)
    cut = [tokenize(row, **limits) for row in ROWS]
    whole = trainer_for(tmp_path, Dataset.from_list(cut))
    left = sum(label != -100 for row in cut for label in row["labels"])
    assert left == (batch["labels"] != -100).sum() < sum(len(row["labels"]) for row in ROWS)
    loss = whole.compute_loss(whole.model, whole.data_collator(cut))
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(loss.item(), abs=1e-6)
    trainer.train()
    assert trainer.state.log_history[-1]["overlong_labelled_steps"] > 0


@pytest.mark.parametrize("known", [False, True])
def test_a_separator_in_angle_brackets(known, tmp_path):
    tokenizer = tiny_tokenizer("qwen2")
    if known:
        tokenizer.add_tokens(["<sep>"], special_tokens=True)
    trainer = trainer_for(tmp_path, tokenizer=tokenizer, step_separator="<sep>")
    row = trainer.data_collator(ROWS[:1])["input_ids"][0].tolist()
    expected = ProcessRewardTrainer.tokenize_row(ROWS[0], tokenizer, **TOKENIZE | {"step_separator": "<sep>"})
    assert row == expected["input_ids"]
    trainer.train()


def test_a_prompt_that_is_a_rendered_chat(tmp_path):
    chat = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    rows = [row | {"prompt": chat} for row in ROWS]
    trainer = trainer_for(tmp_path, rows)
    batch = trainer.data_collator(rows)
    for number, row in enumerate(rows):
        ids = tokenize(row)["input_ids"]
        assert batch["input_ids"][number, : len(ids)].tolist() == ids
    trainer.train()


def test_lora(tmp_path):
    config = LoraConfig(task_type="TOKEN_CLS", r=4, target_modules=["q_proj", "v_proj"])
    trainer = trainer_for(tmp_path, trainer={"peft_config": config}, learning_rate=1e-2)
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    for name, weight in trainer.model.named_parameters():
        assert (weight != before[name]).any() == weight.requires_grad
    assert any("lora" in name and weight.requires_grad for name, weight in trainer.model.named_parameters())


def test_tags(tmp_path):
    assert {"trl", "prm"} <= set(trainer_for(tmp_path).model.model_tags)


@pytest.mark.parametrize("off", [True, False])
def test_dropout(off, tmp_path):
    config = Qwen2Config(
        vocab_size=300,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=2,
        classifier_dropout=0.5,
    )
    model = AutoModelForTokenClassification.from_config(config)
    trainer_for(tmp_path, model=model, disable_dropout=off)
    rates = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == ({0.0} if off else {0.5})


def test_a_token_classifier_by_its_folder_is_recognised(tmp_path):
    tokenizer = tiny_tokenizer("qwen2")
    tiny_classifier(tokenizer).save_pretrained(tmp_path / "prm")
    tokenizer.save_pretrained(tmp_path / "prm")
    trainer = trainer_for(tmp_path / "out", model=str(tmp_path / "prm"))
    assert trainer.args.reward_head == "classification" and trainer.step_format.head == "score"
    with pytest.raises(ValueError, match='share_prefix and loss_type="beta_binomial" need reward_head="lm"'):
        trainer_for(tmp_path / "out", model=str(tmp_path / "prm"), share_prefix=True)


def test_the_loss_is_the_mean_over_all_steps_however_they_are_accumulated(tmp_path):
    """TRL's logged loss was that of its parts, added up."""
    logged = []
    for batch, accumulated in ((4, 1), (2, 2), (1, 4)):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
        trainer = trainer_for(tmp_path, logging_steps=1, max_steps=1, learning_rate=1e-3, **sizes)
        expected = trainer.compute_loss(trainer.model, trainer.data_collator(ROWS)).item()
        trainer.train()
        logged.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert logged == [[pytest.approx(expected, abs=1e-4)]] * 3
