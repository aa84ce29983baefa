"""The [T]-sized losses against their formulas; the same for every kernel."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sdpo_megatron.algorithm.losses import (
    Tokens,
    divergence_weights,
    importance,
    policy_gradient_loss,
    token_losses,
)
from sdpo_megatron.config import LossSettings

LOW, HIGH = 0.2, 0.28
PPO = LossSettings(clip_low=LOW, clip_high=HIGH, rollout_is_cap=None)


def tokens(count: int = 1, **values) -> Tokens:
    """float64 tokens of weight 1 whose server said -1."""
    fill = {
        "weights_T": 1.0,
        "taught_T": 1.0,
        "rollout_T": -1.0,
        "old_T": None,
        "group_advantage_T": 0.0,
    } | values
    return Tokens(**{
        name: torch.full((count,), value, dtype=torch.float64) if isinstance(value, float) else value
        for name, value in fill.items()
    })  # fmt: skip


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def one(log_ratio: float, advantage: float, settings: LossSettings = PPO, **known):
    """(loss, gradient, details) of a single token in float64."""
    student_T = double(-1.0 + log_ratio).requires_grad_()
    loss_T, details = policy_gradient_loss(student_T, double(advantage), tokens(**known), settings)
    loss_T.sum().backward()
    assert student_T.grad is not None
    return loss_T.item(), student_T.grad.item(), {name: value.item() for name, value in details.items()}


@pytest.mark.parametrize("advantage", [2.0, -2.0, 0.0])
@pytest.mark.parametrize("ratio", [0.5, 0.79, 0.81, 1.0, 1.27, 1.29, 3.0])
def test_ppo_value_and_gradient_are_the_formula(ratio, advantage):
    loss, gradient, details = one(math.log(ratio), advantage)
    clipped = min(max(ratio, 1 - LOW), 1 + HIGH)
    stopped = clipped * advantage < ratio * advantage
    assert loss == pytest.approx(-min(ratio * advantage, clipped * advantage), abs=1e-12)
    # d/d(student) of r A is r A; the clipped branch is constant.
    assert gradient == pytest.approx(0.0 if stopped else -ratio * advantage, abs=1e-12)
    assert details["clipped"] == stopped
    assert details["ratio"] == pytest.approx(ratio)


def test_which_side_is_clipped_for_which_sign():
    assert one(math.log(1.5), 1.0)[1] == 0 and one(math.log(1.5), -1.0)[1] == pytest.approx(1.5)
    assert one(math.log(0.5), -1.0)[1] == 0 and one(math.log(0.5), 1.0)[1] == pytest.approx(-0.5)


@pytest.mark.parametrize(("ratio", "weight"), [(0.5, 0.5), (1.9, 1.9), (5.0, 2.0)])
def test_is_clip_caps_the_ratio_as_a_constant(ratio, weight):
    settings = replace_settings(is_clip=2.0)
    loss, gradient, details = one(math.log(ratio), 3.0, settings)
    assert loss == pytest.approx(-weight * 3.0) and gradient == pytest.approx(-weight * 3.0)
    assert details["clipped"] == (ratio > 2.0)


def replace_settings(**values) -> LossSettings:
    return LossSettings(**(PPO.model_dump() | values))


@pytest.mark.parametrize(("old", "correction"), [(-1.5, math.exp(-0.5)), (-0.9, math.exp(0.1)), (1.0, 2.0)])
def test_the_rollout_correction_is_capped_and_the_ratio_is_against_the_old_policy(old, correction):
    settings = replace_settings(rollout_is_cap=2.0)
    loss, gradient, details = one(old + 1.0 + math.log(1.1), 1.0, settings, old_T=double(old))
    assert details["correction"] == pytest.approx(correction) and details["ratio"] == pytest.approx(1.1)
    assert loss == pytest.approx(-correction * 1.1) and gradient == pytest.approx(-correction * 1.1)


def test_without_old_log_probabilities_the_policy_is_its_own_past():
    settings = replace_settings(rollout_is_cap=2.0)
    loss, gradient, details = one(0.3, 1.0, settings)
    assert details["ratio"] == 1.0 and details["correction"] == pytest.approx(math.exp(0.3))
    assert gradient == pytest.approx(-math.exp(0.3))


def test_gradients_agree_with_finite_differences():
    generator = torch.Generator().manual_seed(0)
    student_T, rollout_T, advantages_T = (
        torch.randn(3, 40, generator=generator, dtype=torch.float64) * 0.3 - 1
    )
    weights_T = torch.rand(40, generator=generator, dtype=torch.float64)
    weights_T[::5] = 0
    known = tokens(40, rollout_T=rollout_T, weights_T=weights_T)
    assert torch.autograd.gradcheck(
        lambda x: policy_gradient_loss(x, advantages_T + 1, known, PPO)[0],
        student_T.requires_grad_(),
        eps=1e-7,
        atol=1e-6,
    )


def test_a_token_of_weight_zero_may_hold_anything():
    nan, inf = float("nan"), float("inf")
    known = tokens(4, weights_T=double(1.0, 0.0, 0.0, 0.0), rollout_T=double(-1.0, -1.0, nan, -1.0))
    for settings in (PPO, replace_settings(is_clip=2.0), replace_settings(rollout_is_cap=2.0)):
        student_T = double(-1.0, nan, inf, -1.0).requires_grad_()
        loss_T, _ = policy_gradient_loss(student_T, double(1.0, 1.0, inf, nan), known, settings)
        loss_T.sum().backward()
        assert student_T.grad is not None and student_T.grad.tolist() == [-1.0, 0.0, 0.0, 0.0]
        assert loss_T.tolist() == [-1.0, 0.0, 0.0, 0.0]


def test_nan_in_a_trained_token_is_not_hidden():
    assert math.isnan(one(float("nan"), 1.0)[0])


def test_a_huge_ratio_stays_finite():
    for advantage in (1.0, -1.0, 0.0):
        loss, gradient, _ = one(1000.0, advantage)
        assert math.isfinite(loss) and math.isfinite(gradient)


def losses(settings: LossSettings, known: Tokens, *, student=-1.0, teacher=-0.5, divergence=0.7):
    """(loss, slope by the student's log-probability, slope by the divergence, shown advantage) of one token."""
    student_T, divergence_T = double(student).requires_grad_(), double(divergence).requires_grad_()
    loss_T, details = token_losses(student_T, double(teacher), divergence_T, known, settings)
    loss_T.sum().backward()
    slopes = [0.0 if x.grad is None else x.grad.item() for x in (student_T, divergence_T)]
    return loss_T.item(), *slopes, details["advantage"].item()


def test_token_level_has_the_teachers_log_ratio_as_advantage():
    settings = replace_settings(objective="token")
    assert losses(settings, tokens()) == pytest.approx((-0.5, -0.5, 0.0, 0.5))
    assert losses(settings, tokens(taught_T=0.0)) == pytest.approx((0.0, 0.0, 0.0, 0.0))
    clipped = replace_settings(objective="token", advantage_clip=0.2)
    assert losses(clipped, tokens()) == pytest.approx((-0.2, -0.2, 0.0, 0.2))


def test_sequence_level_spreads_the_mean_advantage():
    settings = replace_settings(objective="sequence")
    known = tokens(sequence_advantage_T=double(2.0))
    assert losses(settings, known) == pytest.approx((-2.0, -2.0, 0.0, 2.0))
    assert losses(settings, replace(known, taught_T=double(0.0))) == pytest.approx((0.0, 0.0, 0.0, 0.0))


def test_grpo_ignores_the_teacher():
    settings = replace_settings(name="grpo")
    assert losses(settings, tokens(group_advantage_T=0.25)) == pytest.approx((-0.25, -0.25, 0.0, 0.25))


def test_the_divergence_is_weighted_and_has_no_policy_gradient_of_its_own():
    settings = replace_settings(is_clip=2.0, rollout_is_cap=2.0)
    known = tokens(weights_T=0.5, old_T=double(-1.2))
    ratio, correction = math.exp(0.2), math.exp(-0.2)
    loss, slope, weight, shown = losses(settings, known)
    assert weight == pytest.approx(0.5 * ratio * correction) and loss == pytest.approx(0.7 * weight)
    assert slope == 0.0 and shown == pytest.approx(0.5)
    assert losses(settings, tokens(taught_T=0.0), divergence=float("inf"))[:3] == (0.0, 0.0, 0.0)


def test_the_blend_is_equation_3():
    known = tokens(group_advantage_T=0.25)
    token = replace_settings(objective="token", group_advantage_weight=0.9)
    assert losses(token, known)[1] == pytest.approx(-(0.9 * 0.25 + 0.1 * 0.5))
    divergence = replace_settings(objective="divergence", group_advantage_weight=0.9)
    _, slope, weight, _ = losses(divergence, known)
    assert slope == pytest.approx(-0.9 * 0.25) and weight == pytest.approx(0.1)


def test_importance_and_weights_carry_no_gradient_where_they_must_not():
    student_T = double(-0.8).requires_grad_()
    settings = replace_settings(rollout_is_cap=2.0, is_clip=2.0)
    _, correction_T = importance(student_T, tokens(), settings)
    assert not correction_T.requires_grad
    assert not divergence_weights(student_T, tokens(), settings).requires_grad


def test_selected_tokens():
    known = tokens(3, weights_T=double(1.0, 2.0, 3.0))
    assert known.select(torch.tensor([2, 0])).weights_T.tolist() == [3.0, 1.0]
    assert replace(known, old_T=double(4.0, 5.0, 6.0)).select(slice(1, 2)).old_T.tolist() == [5.0]  # type: ignore[union-attr, arg-type]
