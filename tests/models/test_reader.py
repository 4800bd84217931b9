"""One way to read a step: what training and scoring have in common, and what the heads are given."""

import pytest
import torch
from datasets import Dataset
from helpers import flat, make_trainer, rollouts, trainer_scores
from peft import LoraConfig

from trl_mprm import ProcessRewardConfig, ProcessRewardTrainer
from trl_mprm.data.rows import IGNORE_INDEX
from trl_mprm.models.reader import StepReader, good_minus_bad


@pytest.mark.parametrize("share_prefix", [False, True], ids=["plain", "shared"])
def test_training_and_scoring_read_alike(share_prefix, tiny_folders, tmp_path, monkeypatch):
    """Every logit of a loss, of an evaluation and of a score comes out of `StepReader.read`; they are the same."""
    read, way = [], StepReader.read
    monkeypatch.setattr(
        StepReader, "read", lambda self, model, inputs: read.append(way(self, model, inputs)) or read[-1]
    )
    rows = [row | {"labels": [1.0] * len(row["labels"])} for row in rollouts("qwen2_5_vl")]
    trainer = make_trainer(tiny_folders, "qwen2_5_vl", tmp_path, rows, share_prefix=share_prefix)
    loss = trainer.compute_loss(trainer.model.eval(), trainer.data_collator(rows))
    trained = good_minus_bad(read[-1])  # the outermost call returns last
    assert loss.item() == pytest.approx(torch.nn.functional.softplus(-trained).mean().item(), abs=1e-6)
    calls = len(read)
    trainer.evaluate(Dataset.from_list(rows))
    assert len(read) > calls
    calls = len(read)
    scores = flat(trainer_scores(trainer, rows))
    assert torch.cat(read[calls:]).shape == (len(scores), 3)
    torch.testing.assert_close(trained.sigmoid().sort().values, torch.tensor(scores).sort().values, atol=1e-5, rtol=0)


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2)], ids=["full", "lora"])
def test_a_classification_head_sees_the_labelled_steps_only(peft_config, tiny_folders, tmp_path):
    rows = rollouts("qwen2")
    args = ProcessRewardConfig(str(tmp_path), reward_head="classification", report_to=[], use_cpu=True)
    trainer = ProcessRewardTrainer(
        tiny_folders["qwen2"], args, train_dataset=Dataset.from_list(rows), peft_config=peft_config
    )
    batch, seen = trainer.data_collator(rows), []
    head = next(module for name, module in trainer.model.named_modules() if name.endswith("score"))
    hook = head.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[:-1].numel()))
    logits, *_ = trainer.read(trainer.model, batch)
    hook.remove()
    labelled = batch["labels"] != IGNORE_INDEX
    assert seen == [labelled.sum()] and labelled.sum() < labelled.numel() / 10
    features = {name: batch[name] for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(logits, trainer.model(**features).logits[labelled][:, [1, 0]])
