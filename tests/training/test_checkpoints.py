"""Checkpoints of full models: what is resumed and what is called best is what was trained."""

import pytest
import torch
from datasets import Dataset
from helpers import make_trainer, rollouts

from trl_mprm import ProcessRewardConfig, ProcessRewardTrainer


SETTINGS = {"max_steps": 6, "save_steps": 2, "learning_rate": 5e-3, "per_device_train_batch_size": 3}


@pytest.mark.parametrize(
    ("architecture", "kwargs"),
    [
        ("qwen2_5_vl", {}),
        ("internvl", {}),
        ("gemma3", {}),
        ("qwen2_5_vl", {"share_prefix": True}),
        ("qwen2", {"train_sampling_strategy": "group_by_length"}),
    ],
)
def test_resumed_in_the_second_epoch_ends_where_it_would_have(architecture, kwargs, tiny_folders, tmp_path):
    rows = rollouts(architecture)  # three updates an epoch
    whole = make_trainer(tiny_folders, architecture, tmp_path / "run", rows, **SETTINGS, **kwargs)
    whole.train()
    resumed = make_trainer(tiny_folders, architecture, tmp_path / "run", rows, **SETTINGS, **kwargs)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    for (name, value), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(other, value, atol=1e-7, rtol=0, msg=name)


def test_the_best_checkpoint_is_loaded(tiny_folders, tmp_path):
    rows = Dataset.from_list(rollouts("qwen2_5_vl"))
    settings = {**SETTINGS, "learning_rate": 0.3}  # it gets worse
    evaluation = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    args = ProcessRewardConfig(str(tmp_path), report_to=[], use_cpu=True, **settings, **evaluation)
    trainer = ProcessRewardTrainer(tiny_folders["qwen2_5_vl"], args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(set(losses)) == 3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=1e-6)
