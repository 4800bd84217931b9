"""The losses, by hand and against naive twins."""

import math

import pytest
import torch
from datasets import Dataset
from helpers import make_trainer, rollouts
from scipy.stats import betabinom

from trl_mprm.models.reader import concentration
from trl_mprm.training.loss import (
    LOSSES,
    StepLoss,
    beta_binomial_losses,
    class_weighted,
    step_losses,
    step_targets,
)


LABELS = torch.tensor([0.0, 1 / 16, 2 / 16, 0.5, 1.0])
LOGITS = torch.tensor([-3.0, 0.0, 0.7, 2.0, -1.5])


@pytest.mark.parametrize(
    ("loss_type", "threshold", "targets"),
    [
        ("hard", 0.0, [0, 1, 1, 1, 1]),
        ("hard", 1 / 16, [0, 0, 1, 1, 1]),  # the paper's Table 2: 1/N
        ("hard", 2 / 16, [0, 0, 0, 1, 1]),  # 2/N
        ("soft", 0.0, LABELS.tolist()),
        ("beta_binomial", 0.0, LABELS.tolist()),
    ],
)
def test_targets(loss_type, threshold, targets):
    assert step_targets(LABELS, loss_type, threshold).tolist() == targets


@pytest.mark.parametrize("loss_type", ["hard", "soft"])
def test_cross_entropy_over_two_tokens(loss_type):
    """The twin: softmax over the logits of "Yes" and "No", target [p, 1 - p]."""
    no = torch.tensor([0.3, -1.0, 2.0, 0.0, 5.0])
    pair = torch.stack([LOGITS + no, no], dim=-1)
    targets = step_targets(LABELS, loss_type)
    twin = torch.nn.functional.cross_entropy(pair, torch.stack([targets, 1 - targets], -1), reduction="none")
    torch.testing.assert_close(step_losses(LOGITS, targets), twin)
    by_hand = [-t * math.log(1 / (1 + math.exp(-z))) - (1 - t) * math.log(1 / (1 + math.exp(z))) for z, t in
               zip(LOGITS.tolist(), targets.tolist(), strict=True)]  # fmt: skip
    assert step_losses(LOGITS, targets).tolist() == pytest.approx(by_hand, abs=1e-6)


def test_beta_binomial_against_scipy():
    logits, raw = LOGITS.double(), torch.tensor([-2.0, 0.0, 1.0, 3.0, 8.0])
    totals = torch.tensor([16.0, 16.0, 16.0, 2.0, 1.0])
    labels = torch.tensor([0.0, 1 / 16, 2 / 16, 0.5, 1.0])
    losses = beta_binomial_losses(logits, raw, labels, totals, penalty=0.0)
    for loss, z, c, label, total in zip(losses, logits, concentration(raw), labels, totals, strict=True):
        mean = z.sigmoid().item()
        expected = -betabinom.logpmf(
            round(label.item() * total.item()), int(total), mean * c.item(), (1 - mean) * c.item()
        )
        assert loss.item() == pytest.approx(expected, rel=2e-4)
    penalised = beta_binomial_losses(logits, raw, labels, totals, penalty=0.05)
    extra = 0.05 * (logits.sigmoid() - labels).abs() * concentration(raw)
    torch.testing.assert_close(penalised, (losses + extra).float(), check_dtype=False)


def test_concentration_learns_how_sure_the_mean_is():
    """Counts that agree with the mean pull the concentration up, counts that scatter pull it down."""
    totals = torch.full((4,), 16.0)
    for counts, sign in (([8.0, 8.0, 8.0, 8.0], 1), ([0.0, 16.0, 0.0, 16.0], -1)):
        raw = torch.zeros(4, requires_grad=True)
        beta_binomial_losses(torch.zeros(4), raw, torch.tensor(counts) / 16, totals).sum().backward()
        assert (raw.grad * -sign > 0).all()
    # The penalty does not move the mean.
    logits = torch.zeros(1, requires_grad=True)
    penalties = [0.0, 5.0]
    grads = []
    for penalty in penalties:
        logits.grad = None
        beta_binomial_losses(
            logits, torch.zeros(1), torch.tensor([0.25]), torch.tensor([16.0]), penalty
        ).sum().backward()
        grads.append(logits.grad.item())
    assert grads[0] == grads[1]


def test_beta_binomial_is_finite_where_the_mean_is_extreme():
    logits = torch.tensor([-80.0, 80.0], requires_grad=True)
    raw = torch.tensor([-60.0, 60.0], requires_grad=True)
    loss = beta_binomial_losses(logits, raw, torch.tensor([1.0, 0.0]), torch.tensor([16.0, 16.0])).sum()
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(raw.grad).all() and torch.isfinite(logits.grad).all()


def test_class_weights():
    losses, targets = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 0.0, 0.75])
    assert class_weighted(losses, targets, good=0.5, bad=3.0).tolist() == [0.5, 6.0, 4 * (0.375 + 0.75)]


def test_a_new_loss_is_one_entry(tiny_folders, tmp_path, monkeypatch):
    """A squared error with a weight per step, from a column of its own: checked, collated, cut with its step, trained."""

    def of_row(row, name):
        if len(row["sure"]) != len(row["labels"]):
            raise ValueError(f"{name}: {len(row['sure'])} values in `sure`, expected one per step")
        return row["labels"], {"sure": row["sure"]}

    squared = StepLoss(
        losses=lambda logits, targets, columns, config: (
            columns["sure"] * ((logits[:, 0] - logits[:, 1]).sigmoid() - targets) ** 2
        ),
        targets=lambda labels, threshold: labels,
        columns=("sure",),
        of_row=of_row,
        fits=lambda table: False,
    )
    monkeypatch.setitem(LOSSES, "squared", squared)
    rows = rollouts("qwen2")
    with pytest.raises(ValueError, match="train_dataset has no column sure"):
        make_trainer(tiny_folders, "qwen2", tmp_path, rows, loss_type="squared")
    rows = [row | {"sure": [1.0 + number for number in range(len(row["labels"]))]} for row in rows]
    short = [*rows, rows[0] | {"sure": [], "rollout_id": "r:short"}]
    with pytest.raises(ValueError, match="train_dataset, row r:short: 0 values in `sure`, expected one per step"):
        make_trainer(tiny_folders, "qwen2", tmp_path, short, loss_type="squared")
    settings = {"overlong": "drop_steps", "max_length": 60}
    trainer = make_trainer(tiny_folders, "qwen2", tmp_path, rows, loss_type="squared", max_steps=1, **settings)
    batch = trainer.data_collator(rows)
    labelled = batch["labels"] != -100
    assert batch["extra"]["overlong"][2] > 0 and len(batch["extra"]["sure"]) == labelled.sum()
    logits, losses, _ = trainer.read(trainer.model, batch)
    sure = torch.cat([1.0 + torch.arange(n)[torch.arange(n) != 1] for n in (1, 2, 3, 4)] * 2)[: len(losses)]
    error = (logits[:, 0] - logits[:, 1]).sigmoid() - batch["labels"][labelled]
    assert set(batch["extra"]["sure"].tolist()) <= set(sure.tolist())
    torch.testing.assert_close(losses, batch["extra"]["sure"] * error**2)
    trainer.train()
    assert Dataset.from_list(trainer.state.log_history)["loss"][0] > 0
