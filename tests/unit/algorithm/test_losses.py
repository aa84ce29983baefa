import math

import pytest
import torch

from sdpo_megatron.algorithm.losses import clipped_is_loss

LOW, HIGH = 0.2, 0.28


def one(log_ratio: float, advantage: float, weight: float = 1.0):
    """(loss, gradient, metrics) of a single token in float64."""
    student_T = torch.tensor([-1.0 + log_ratio], dtype=torch.float64, requires_grad=True)
    loss, metrics = clipped_is_loss(
        student_T,
        torch.tensor([-1.0], dtype=torch.float64),
        torch.tensor([advantage], dtype=torch.float64),
        torch.tensor([weight], dtype=torch.float64),
        LOW,
        HIGH,
    )
    loss.backward()
    assert student_T.grad is not None
    return loss.item(), student_T.grad.item(), metrics


@pytest.mark.parametrize("advantage", [2.0, -2.0, 0.0])
@pytest.mark.parametrize("ratio", [0.5, 0.79, 0.81, 1.0, 1.27, 1.29, 3.0])
def test_value_and_gradient_are_the_formula(ratio, advantage):
    loss, gradient, metrics = one(math.log(ratio), advantage)
    clipped = min(max(ratio, 1 - LOW), 1 + HIGH)
    stopped = clipped * advantage < ratio * advantage
    assert loss == pytest.approx(-min(ratio * advantage, clipped * advantage), abs=1e-12)
    # d/d(student) of r A is r A; the clipped branch is constant.
    assert gradient == pytest.approx(0.0 if stopped else -ratio * advantage, abs=1e-12)
    assert metrics["clipped"].item() == stopped
    assert metrics["ratio"].item() == pytest.approx(ratio)


def test_which_side_is_clipped_for_which_sign():
    assert one(math.log(1.5), 1.0)[1] == 0 and one(math.log(1.5), -1.0)[1] == pytest.approx(1.5)
    assert one(math.log(0.5), -1.0)[1] == 0 and one(math.log(0.5), 1.0)[1] == pytest.approx(-0.5)


def test_weighted_sums_over_tokens_agree_with_finite_differences():
    generator = torch.Generator().manual_seed(0)
    student_T, rollout_T, advantages_T = (
        torch.randn(3, 40, generator=generator, dtype=torch.float64) * 0.3 - 1
    )
    weights_T = torch.rand(40, generator=generator, dtype=torch.float64)
    weights_T[::5] = 0
    arguments = (rollout_T, advantages_T + 1, weights_T, LOW, HIGH)
    assert torch.autograd.gradcheck(
        lambda x: clipped_is_loss(x, *arguments)[0], student_T.requires_grad_(), eps=1e-7, atol=1e-6
    )
    loss, metrics = clipped_is_loss(student_T, *arguments)
    pieces = [
        clipped_is_loss(x, rollout, advantage, weight, LOW, HIGH)
        for x, rollout, advantage, weight in zip(
            *(tensor.split(1) for tensor in (student_T, *arguments[:3])), strict=True
        )
    ]
    assert sum(piece[0].item() for piece in pieces) == pytest.approx(loss.item())
    for name in ("loss", "weight", "ratio", "clipped", "advantage"):
        assert sum(piece[1][name].item() for piece in pieces) == pytest.approx(metrics[name].item())
    assert metrics["weight"].item() == pytest.approx(weights_T.sum().item())


def test_a_token_of_weight_zero_may_hold_anything():
    nan, inf = float("nan"), float("inf")
    student_T = torch.tensor([-1.0, nan, inf, -1.0], requires_grad=True)
    rollout_T = torch.tensor([-1.0, -1.0, nan, -1.0])
    advantages_T = torch.tensor([1.0, 1.0, inf, nan])
    loss, metrics = clipped_is_loss(
        student_T, rollout_T, advantages_T, torch.tensor([1.0, 0.0, 0.0, 0.0]), LOW, HIGH
    )
    loss.backward()
    assert loss.item() == -1.0
    assert student_T.grad is not None and student_T.grad.tolist() == [-1.0, 0.0, 0.0, 0.0]
    assert {k: v.item() for k, v in metrics.items()} == {
        "loss": -1,
        "weight": 1,
        "ratio": 1,
        "clipped": 0,
        "advantage": 1,
    }


def test_nan_in_a_trained_token_is_not_hidden():
    assert math.isnan(one(float("nan"), 1.0)[0])


def test_a_huge_ratio_stays_finite():
    for advantage in (1.0, -1.0, 0.0):
        loss, gradient, _ = one(1000.0, advantage)
        assert math.isfinite(loss) and math.isfinite(gradient)


def test_advantages_and_rollout_get_no_gradient():
    student_T, rollout_T, advantages_T = (torch.zeros(2, requires_grad=True) for _ in range(3))
    clipped_is_loss(student_T, rollout_T, advantages_T + 1, torch.ones(2), LOW, HIGH)[0].backward()
    assert rollout_T.grad is None and advantages_T.grad is None
