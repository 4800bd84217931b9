"""A classification head, as TRL's PRMTrainer trained one up to 1.13: golden numbers made with that version."""

import json

import pytest
import torch
from datasets import Dataset
from golden.make_trl_1_13_prm import GOLDEN, ROWS, checksum, tiny_classifier
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from trl_mprm import ProcessRewardConfig, ProcessRewardModel, ProcessRewardTrainer, StepFormat
from trl_mprm.models.tiny import tiny_tokenizer


CASES = [case for case in json.loads(GOLDEN.read_text())["cases"] if "max_length" not in case]


def trainer_for(case: dict, tmp_path, **kwargs) -> ProcessRewardTrainer:
    tokenizer = tiny_tokenizer("qwen2")
    if "bos_token" in case:
        tokenizer.bos_token = case["bos_token"]
    model = tiny_classifier(tokenizer)
    assert checksum(model) == pytest.approx(case["weights_checksum"], abs=1e-6)
    rows = ROWS
    if case.get("train_on_last_step_only"):  # -100 says the same without an option
        rows = [row | {"labels": [-100.0] * (len(row["labels"]) - 1) + [float(row["labels"][-1])]} for row in ROWS]
    args = ProcessRewardConfig(
        str(tmp_path),
        reward_head="classification",
        step_separator=case["step_separator"],
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        **kwargs,
    )
    return ProcessRewardTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['step_separator']!r}-{len(case)}")
def test_tokens_labels_and_loss_are_those_of_trl_1_13(case, tmp_path):
    trainer = trainer_for(case, tmp_path)
    batch = trainer.data_collator(list(trainer.train_dataset))
    for row, (ids, labels) in enumerate(zip(case["input_ids"], case["labels"], strict=True)):
        length = int(batch["attention_mask"][row].sum())
        assert batch["input_ids"][row, :length].tolist() == ids
        assert batch["labels"][row, :length].tolist() == labels
        assert (batch["labels"][row, length:] == -100).all()
    trainer.model.train()  # dropout is off, as it was there
    loss = trainer.compute_loss(trainer.model, batch)
    assert loss.item() == pytest.approx(case["initial_loss"], abs=1e-6)


def test_training_follows_trl_1_13(tmp_path):
    case = CASES[0]
    settings = {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 0.005, "weight_decay": 0.0}
    settings |= {"warmup_steps": 0, "max_grad_norm": 1e9, "max_steps": 3, "logging_steps": 1}
    trainer = trainer_for(case, tmp_path, **settings)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in logged] == pytest.approx(case["logged_losses"], abs=2e-4)
    assert [entry["grad_norm"] for entry in logged] == pytest.approx(case["grad_norms"], rel=1e-3)


def test_saved_as_an_ordinary_token_classifier(tmp_path):
    trainer = trainer_for(CASES[0], tmp_path / "prm", max_steps=2, learning_rate=1e-3)
    trainer.train()
    trainer.save_model()
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "prm").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "prm")
    row, ids = ROWS[1], CASES[0]["input_ids"][1]
    assert tokenizer.encode(row["prompt"] + "".join(step + "\n" for step in row["completions"])) == ids
    places = [place for place, label in enumerate(CASES[0]["labels"][1]) if label != -100]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, places].softmax(-1)[:, 1].tolist()
    prm = ProcessRewardModel.from_pretrained(tmp_path / "prm")
    assert prm.score([], row["prompt"], row["completions"]) == pytest.approx(expected, abs=1e-6)
    assert StepFormat.load(tmp_path / "prm").head == "score"
    assert "Yes" not in (tmp_path / "prm" / "README.md").read_text()


def test_a_base_model_by_its_id_gets_a_new_head_and_lora_trains_it(tiny_folders, tmp_path):
    args = ProcessRewardConfig(
        str(tmp_path / "prm"),
        reward_head="classification",
        max_steps=3,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
    )
    trainer = ProcessRewardTrainer(
        tiny_folders["qwen2"], args, train_dataset=Dataset.from_list(ROWS), peft_config=LoraConfig(r=4)
    )
    before = {name: value.clone() for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert any("score" in name for name in before)
    trainer.train()
    moved = {
        name for name, value in trainer.model.named_parameters() if name in before and (value != before[name]).any()
    }
    assert moved == set(before)
    trainer.save_model()
    merged = trainer.model.merge_and_unload().eval()
    ids = torch.tensor([trainer.processing_class.encode("2+2?2+2\n")])
    with torch.no_grad():
        expected = merged(ids).logits[0, -1].softmax(-1)[1].item()
    prm = ProcessRewardModel.from_pretrained(tmp_path / "prm")
    assert prm.score([], "2+2?", ["2+2"]) == [pytest.approx(expected, abs=1e-6)]


def test_bad_heads(tiny_folders, tmp_path):
    args = ProcessRewardConfig(str(tmp_path), reward_head="classification", report_to=[], use_cpu=True)
    rows = Dataset.from_list(ROWS)
    with pytest.raises(
        ValueError, match="reads images, and no vision-language model has a token classification class"
    ):
        ProcessRewardTrainer(tiny_folders["qwen2_5_vl"], args, train_dataset=rows)
    model = AutoModelForCausalLM.from_pretrained(tiny_folders["qwen2"])
    with pytest.raises(ValueError, match="needs an AutoModelForTokenClassification of 2 labels, got Qwen2ForCausalLM"):
        ProcessRewardTrainer(model, args, train_dataset=rows, processing_class=tiny_tokenizer("qwen2"))
    with pytest.raises(ValueError, match='share_prefix and loss_type="beta_binomial" need reward_head="lm"'):
        ProcessRewardConfig(str(tmp_path), reward_head="classification", share_prefix=True)
    with pytest.raises(ValueError, match="reward_head is 'head', expected one of lm, classification"):
        ProcessRewardConfig(str(tmp_path), reward_head="head")
