"""The losses, by hand and against naive twins."""

import math

import pytest
import torch
from scipy.stats import betabinom

from trl_mprm.models.reader import concentration
from trl_mprm.training.loss import beta_binomial_losses, class_weighted, step_losses, step_targets


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
