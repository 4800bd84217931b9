"""
Exact and restartable: killed and resumed, streamed, split over processes, seeded; real processes, real SIGKILL.

A checkpoint is a folder `checkpoint-4`, in which Trainer writes the model first and `trainer_state.json` last.
"""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_from_disk
from golden.make_curve import GOLDEN, TOLERANCE, curve
from helpers import FORKSERVER, as_dataset, config, dataset, make_rows, run_processes
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerCallback

from trl_mprm import ProcessRewardTrainer


FORKSERVER.set_forkserver_preload(["trl_mprm.training.trainer"])


class KillAfter(TrainerCallback):
    """Kill the process when step `step` is done, before anything of it is saved."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class KilledWhileSaving(ProcessRewardTrainer):
    """Killed when the model of checkpoint 4 is written, and its optimizer is not."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save_optimizer_and_scheduler(output_dir)


def train(model: str, rows: str, output: str, options: dict[str, Any], fate: str = "", resume: bool = False) -> None:
    """Six steps in two epochs of shuffled rows, accumulated, with dropout and a schedule; a checkpoint every two."""
    trainer = (KilledWhileSaving if fate == "saving" else ProcessRewardTrainer)(
        model=model,
        args=config(
            output,
            num_train_epochs=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            save_strategy="steps",
            save_steps=2,
            warmup_steps=2,
            **options,
        ),
        train_dataset=load_from_disk(rows),
        peft_config=LoraConfig(r=4, lora_dropout=0.1),
        callbacks=[KillAfter(3)] if fate == "step" else None,
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()


@pytest.mark.parametrize("options", [{}, {"share_prefix": True}], ids=["plain", "shared_prefix"])
def test_killed_and_resumed_is_uninterrupted(options, tiny_folders, tmp_path):
    """Killed after step 3, resumed, killed while checkpoint 4 is written, resumed: the same weights, bit by bit."""
    rows = [{**row, "prompt": f"How many tiles of {index // 3}?"} for index, row in enumerate(make_rows(False, 12))]
    as_dataset(rows).save_to_disk(tmp_path / "rows")
    model, log = tiny_folders["qwen2"], tmp_path / "log"

    def run(output: str, *how: Any) -> list[int]:
        return run_processes(train, model, str(tmp_path / "rows"), str(tmp_path / output), options, *how, log=log)

    assert run("whole") == [0], log.read_text()
    killed = tmp_path / "killed"
    assert run("killed", "step") == [-signal.SIGKILL], log.read_text()
    assert [path.name for path in killed.glob("checkpoint-*")] == ["checkpoint-2"]
    assert run("killed", "saving", True) == [-signal.SIGKILL], log.read_text()
    half = {path.name for path in (killed / "checkpoint-4").iterdir()}
    assert "adapter_model.safetensors" in half and not half & {"optimizer.pt", "trainer_state.json"}
    assert run("killed", "", True) == [0], log.read_text()
    assert "checkpoint-4 was not written to its end" in log.read_text()

    whole, resumed = (load_file(tmp_path / output / "adapter_model.safetensors") for output in ("whole", "killed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    histories = [
        json.loads((tmp_path / output / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
        for output in ("whole", "killed")
    ]
    curves = [[(entry["step"], entry["loss"], entry["grad_norm"]) for entry in history] for history in histories]
    assert len(curves[0]) == 6 and curves[0] == curves[1]


def test_no_whole_checkpoint_says_so(tiny_folders, tmp_path):
    trainer = ProcessRewardTrainer(model=tiny_folders["qwen2"], args=config(tmp_path), train_dataset=dataset("qwen2"))
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text('{"best_metric": nu')
    with pytest.raises(ValueError, match="has no whole checkpoint to resume from"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("architecture", "rank", "message"),
    [
        ("llama", 4, "checkpoint-1 is an adapter of a Qwen2ForCausalLM, and this model is a LlamaForCausalLM"),
        ("internvl", 4, "checkpoint-1 is an adapter of a Qwen2ForCausalLM, and this model is a InternVLFor"),
        ("qwen2", 2, "checkpoint-1 does not fit this Qwen2ForCausalLM: resume with the model, its size and the LoRA"),
    ],
)
def test_the_checkpoint_of_another_adapter_is_refused(architecture, rank, message, tiny_folders, tmp_path):
    for model, r, resume in (("qwen2", 4, None), (architecture, rank, str(tmp_path / "checkpoint-1"))):
        trainer = ProcessRewardTrainer(
            model=tiny_folders[model],
            args=config(tmp_path, max_steps=1, save_strategy="steps", save_steps=1),
            train_dataset=dataset("qwen2"),
            peft_config=LoraConfig(r=r),
        )
        if resume is None:
            trainer.train()
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=resume)


def test_same_seed_same_curve(tmp_path):
    """Twice the same to the last bit; and the golden curve, whose environment is written beside it."""
    first, again = curve(tmp_path / "first"), curve(tmp_path / "again")
    assert first == again
    golden = json.loads(GOLDEN.read_text())
    for name, values in golden["curve"].items():
        assert first[name] == pytest.approx(values, abs=TOLERANCE), f"{name}, made with {golden['environment']}"
    assert curve(tmp_path / "other", seed=1) != first


def stream(model: str, rows: str, output: str, batch_size: int) -> None:
    args = config(output, max_steps=2, optim="sgd", learning_rate=0.1, per_device_train_batch_size=batch_size)
    data = load_from_disk(rows).to_iterable_dataset()
    trainer = ProcessRewardTrainer(model=model, args=args, train_dataset=data, eval_dataset={"all": data})
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        Path(output, "metrics.json").write_text(json.dumps([metrics["eval_all_loss"], metrics["eval_all_auc"]]))


def test_stream_on_two_processes_is_the_stream_on_one(tiny_folders, tmp_path):
    """Rows with pictures; the two processes take turns in each batch, also in an evaluation."""
    dataset("internvl", 16).save_to_disk(tmp_path / "rows")
    results = []
    for n in (1, 2):
        output, log = tmp_path / f"out{n}", tmp_path / f"log{n}"
        argv = (tiny_folders["internvl"], str(tmp_path / "rows"), str(output), 8 // n)
        assert run_processes(stream, *argv, n=n, log=log) == [0] * n, log.read_text()
        metrics = json.loads((output / "metrics.json").read_text())
        results.append((metrics, load_file(output / "model.safetensors")))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-6)
    for name, value in results[0][1].items():
        assert torch.allclose(value, results[1][1][name], rtol=0, atol=1e-6), name


def test_stops_early_and_keeps_the_best(tiny_folders, tmp_path):
    """With a learning rate of zero nothing improves: stopped at the second evaluation, the first is the best."""
    trainer = ProcessRewardTrainer(
        model=tiny_folders["qwen2"],
        args=config(
            tmp_path,
            learning_rate=0.0,
            max_steps=10,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="best",
            metric_for_best_model="eval_loss",
            load_best_model_at_end=True,
        ),
        train_dataset=dataset("qwen2"),
        eval_dataset=dataset("qwen2", 4),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=1)],
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
