"""What breaks a training: damaged checkpoints, losses that are not finite, rows that cannot be read or teach nothing."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from datasets import Dataset, DatasetDict
from helpers import config, dataset, make_trainer, picture, rollouts
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainingArguments

from trl_mprm import DataCollatorForProcessReward, ProcessRewardTrainer
from trl_mprm.training.card import describe_dataset
from trl_mprm.training.checkpoints import checkpoint_fault, last_whole_checkpoint


@pytest.fixture(scope="module")
def run(tiny_folders, tmp_path_factory):
    """A full training with checkpoints 1 and 2."""
    folder = tmp_path_factory.mktemp("run")
    args = config(folder, max_steps=2, save_strategy="steps", save_steps=1, per_device_train_batch_size=2)
    ProcessRewardTrainer(tiny_folders["qwen2"], args, train_dataset=dataset("qwen2")).train()
    return folder


def cut(path):
    path.write_bytes(path.read_bytes()[:-200])


DAMAGE = {
    "optimizer.pt is missing": lambda c: (c / "optimizer.pt").unlink(),
    "scheduler.pt is missing": lambda c: (c / "scheduler.pt").unlink(),
    "rng_state.pth is missing": lambda c: (c / "rng_state.pth").unlink(),
    "config.json is missing": lambda c: (c / "config.json").unlink(),
    "safetensors is missing": lambda c: (c / "model.safetensors").unlink(),
    "optimizer.pt does not load": lambda c: cut(c / "optimizer.pt"),
    "scheduler.pt does not load": lambda c: cut(c / "scheduler.pt"),
    "rng_state.pth does not load": lambda c: cut(c / "rng_state.pth"),
    "model.safetensors is cut short": lambda c: cut(c / "model.safetensors"),
    "trainer_state.json is missing": lambda c: (c / "trainer_state.json").unlink(),
    "trainer_state.json is not the state": lambda c: (c / "trainer_state.json").write_text('{"steps": [1]}'),
    "trainer_state.json is not": lambda c: (c / "trainer_state.json").write_text("[]"),
}


@pytest.mark.parametrize("fault", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_passed_over(fault, run, tmp_path, caplog):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-9-backup").mkdir()
    assert last_whole_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-2")
    DAMAGE[fault](tmp_path / "run" / "checkpoint-2")
    assert last_whole_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-1")
    assert "checkpoint-2 was not written to its end, or is damaged" in caplog.text and fault in caplog.text


def test_a_checkpoint_without_its_optimizer_is_not_resumed(run, tiny_folders, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint-1"
    trainer = ProcessRewardTrainer(tiny_folders["qwen2"], config(tmp_path / "run"), train_dataset=dataset("qwen2"))
    (checkpoint / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"cannot resume from .*checkpoint-1: optimizer.pt is missing; resume_from"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert checkpoint_fault(tmp_path / "nowhere") == "there is no such folder"


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2)], ids=["full", "lora"])
def test_a_loss_that_is_not_finite_stops_the_run(peft_config, tiny_folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_folders["qwen2"])
    model.model.layers[0].self_attn.q_proj.weight.data[:] = torch.nan
    trainer = ProcessRewardTrainer(
        model,
        config(tmp_path, save_strategy="steps", save_steps=1),
        train_dataset=dataset("qwen2"),
        peft_config=peft_config,
    )
    with pytest.raises(
        ValueError, match=r"the loss of step 1 is nan \(learning rate 0.005\): the run stops.*nothing is"
    ):
        trainer.train()
    assert not list(tmp_path.glob("**/*.safetensors"))


def test_weights_that_are_not_finite_are_not_saved(tiny_folders, tmp_path):
    """The last step of all: no further loss tells that the weights are gone."""
    args = config(tmp_path, learning_rate=1e38, max_grad_norm=0, max_steps=1, optim="sgd", save_strategy="steps")
    args.save_steps = 1
    trainer = ProcessRewardTrainer(tiny_folders["qwen2"], args, train_dataset=dataset("qwen2"))
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(1e4)
    with pytest.raises(ValueError, match=r"not finite after step 1 .*the run stops, nothing is saved"):
        trainer.train()
    assert not list(tmp_path.glob("**/*.safetensors"))
    with pytest.raises(ValueError, match="not finite"):
        trainer.save_model()


def test_a_picture_that_the_processor_refuses_names_its_row(tiny_folders, tmp_path):
    rows = rollouts("qwen2_5_vl")
    rows[5] = {**rows[5], "images": [picture("red", (2, 900))]}  # Qwen2.5-VL: at most 200 times as long as wide
    trainer = make_trainer(tiny_folders, "qwen2_5_vl", tmp_path, rows)
    with pytest.raises(ValueError, match="row r:5: .*aspect ratio"):
        trainer.train()


def test_a_training_of_which_every_row_is_dropped_is_an_error(tiny_folders, tmp_path):
    settings = {"max_length": 3, "overlong": "drop_row", "per_device_train_batch_size": 4}
    trainer = make_trainer(tiny_folders, "qwen2", tmp_path, rollouts("qwen2"), **settings)
    with pytest.raises(ValueError, match="no labelled step of 8 rows is left to train on, they are longer than"):
        trainer.train()


@pytest.mark.parametrize("kind", ["arrow", "numpy", "torch", "pandas", "polars"])
@pytest.mark.parametrize("stream", [False, True], ids=["rows", "stream"])
def test_a_formatted_data_set_trains_as_a_plain_one(kind, stream, tiny_folders, tmp_path):
    if kind == "polars":
        pytest.importorskip("polars")
    losses = []
    for form in (None, kind):
        data = dataset("qwen2").with_format(form)
        data = dataset("qwen2").to_iterable_dataset().with_format(form) if stream else data
        args = config(tmp_path, max_steps=1, train_sampling_strategy="sequential")
        trainer = ProcessRewardTrainer(tiny_folders["qwen2"], args, train_dataset=data)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
        if not stream:
            losses[-1] += trainer.evaluate(dataset("qwen2").with_format(form))["eval_loss"]
    assert losses[0] == losses[1]


def test_a_card_counts_the_data_set_once(tiny_folders, tmp_path, monkeypatch):
    counted = []
    monkeypatch.setattr(
        "trl_mprm.training.trainer.describe_dataset", lambda rows: counted.append(len(rows)) or describe_dataset(rows)
    )
    args = config(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    trainer = ProcessRewardTrainer(tiny_folders["qwen2"], args, train_dataset=dataset("qwen2"))
    trainer.train()
    trainer.save_model()
    assert counted == [8]
    assert json.loads((tmp_path / "checkpoint-2" / "model_card.json").read_text())["dataset"]["rows"] == 8


def test_upstream_says_nothing_that_is_of_no_use(tiny_folders, tmp_path):
    """A whole command in a process of its own, as a user starts it: an adapter, checkpointing, a shared prefix, scoring."""
    data = dataset("qwen2", 4)
    data.remove_columns("images").to_json(tmp_path / "rows.jsonl")
    settings = {"model_name_or_path": tiny_folders["qwen2"], "dataset_name": tmp_path / "rows.jsonl"}
    settings |= {"output_dir": tmp_path / "run", "max_steps": 1, "report_to": "none", "share_prefix": "true"}
    settings |= {"gradient_checkpointing": "true", "use_cpu": "true", "use_peft": "true", "load_in_4bit": "true"}
    argv = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    done = subprocess.run([sys.executable, "-m", "trl_mprm.cli", "train", *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for noise in ("FutureWarning", "gemm_4bit", "pin_memory", "0.00 GB"):
        assert noise not in done.stderr + done.stdout, done.stderr


def test_a_null_among_labels_or_steps_names_its_row(tiny_folders, tmp_path):
    row = {"prompt": "q", "completions": ["a", "b"], "labels": [1.0, 0.0]}
    for change, message in (
        ({"labels": [1.0, None]}, "label of step 1 is None"),
        ({"completions": ["a", None]}, "step 1 is"),
    ):
        data = Dataset.from_list([row, row | change])
        with pytest.raises(ValueError, match=f"train_dataset, row 1: {message}"):
            ProcessRewardTrainer(tiny_folders["qwen2"], config(tmp_path), train_dataset=data)


def test_what_is_no_configuration_or_no_data_set(tiny_folders, tmp_path):
    data = dataset("qwen2")
    for change, message in (
        ({"args": TrainingArguments(str(tmp_path))}, "args is a TrainingArguments, expected a ProcessRewardConfig"),
        (
            {"train_dataset": DatasetDict(train=data, test=data)},
            r"train_dataset is a dict of data sets \(train, test\)",
        ),
        ({"train_dataset": data.to_list()}, "train_dataset is a list, expected a datasets.Dataset: Dataset.from_list"),
    ):
        kwargs = {"args": config(tmp_path), "train_dataset": data} | change
        with pytest.raises(ValueError, match=message):
            ProcessRewardTrainer(tiny_folders["qwen2"], **kwargs)
    with pytest.raises(ValueError, match="a row is 'prompt', expected a dict"):
        DataCollatorForProcessReward(None)(["prompt"])
