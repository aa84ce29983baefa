"""The [T]-sized losses against their formulas; the same for every kernel."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sdpo_megatron.algorithm.losses import LOSSES, build_terms
from sdpo_megatron.algorithm.losses.base import LossInputs, LossSettings, Scores
from sdpo_megatron.algorithm.losses.importance_weighted import (
    importance,
    policy_gradient_loss,
    sdpo_advantages,
)
from tests.loss_settings import loss_settings

LOW, HIGH = 0.2, 0.28
PPO = loss_settings("grpo", clip_low=LOW, clip_high=HIGH, rollout_is_cap=None)


def tokens(count: int = 1, **values: Any) -> LossInputs:
    """float64 tokens of weight 1 whose server said -1."""
    fill: dict[str, Any] = {
        "weights_T": 1.0,
        "teacher_mask_T": 1.0,
        "rollout_logprobs_T": -1.0,
        "old_logprobs_T": None,
        "group_advantages_T": 0.0,
    } | values
    filled: dict[str, Any] = {
        name: torch.full((count,), value, dtype=torch.float64) if isinstance(value, float) else value
        for name, value in fill.items()
    }
    return LossInputs(**filled)


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
    """Of GRPO, without correction for the server unless it is given."""
    return loss_settings("grpo", **{"rollout_is_cap": None, **values})


@pytest.mark.parametrize(("old", "correction"), [(-1.5, math.exp(-0.5)), (-0.9, math.exp(0.1)), (1.0, 2.0)])
def test_the_rollout_correction_is_capped_and_the_ratio_is_against_the_old_policy(old, correction):
    settings = replace_settings(rollout_is_cap=2.0)
    loss, gradient, details = one(old + 1.0 + math.log(1.1), 1.0, settings, old_logprobs_T=double(old))
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
    known = tokens(40, rollout_logprobs_T=rollout_T, weights_T=weights_T)
    assert torch.autograd.gradcheck(
        lambda x: policy_gradient_loss(x, advantages_T + 1, known, PPO)[0],
        student_T.requires_grad_(),
        eps=1e-7,
        atol=1e-6,
    )


def test_a_token_of_weight_zero_may_hold_anything():
    nan, inf = float("nan"), float("inf")
    known = tokens(4, weights_T=double(1.0, 0.0, 0.0, 0.0), rollout_logprobs_T=double(-1.0, -1.0, nan, -1.0))
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


def losses(settings: LossSettings, known: LossInputs, *, student=-1.0, teacher=-0.5, divergence=0.7):
    """(loss, slope by the student's log-probability, slope by the divergence, shown advantage) of one token, of the
    first term."""
    student_T, divergence_T = double(student).requires_grad_(), double(divergence).requires_grad_()
    scores = Scores(
        student_logprobs_T=student_T, teacher_logprobs_T=double(teacher), divergences_T=divergence_T
    )
    loss_T, details = build_terms(settings)[0].loss.token_losses(scores, known)
    loss_T.sum().backward()
    slopes = [0.0 if x.grad is None else x.grad.item() for x in (student_T, divergence_T)]
    return loss_T.item(), *slopes, details["advantage"].item()


def test_the_advantage_is_teacher_minus_student_where_there_is_a_teacher():
    student_T = double(-1.0, -2.0, -3.0).requires_grad_()
    scores = Scores(
        student_logprobs_T=student_T,
        teacher_logprobs_T=double(-0.5, -4.0, float("nan")),
        divergences_T=double(0.0, 0.0, 0.0),
    )
    advantages_T = sdpo_advantages(scores, tokens(3, teacher_mask_T=double(1.0, 1.0, 0.0)))
    assert advantages_T.tolist() == [0.5, -2.0, 0.0]
    assert not advantages_T.requires_grad


def test_token_level_has_the_teachers_log_ratio_as_advantage():
    settings = loss_settings("token", rollout_is_cap=None)
    assert losses(settings, tokens()) == pytest.approx((-0.5, -0.5, 0.0, 0.5))
    assert losses(settings, tokens(teacher_mask_T=0.0)) == pytest.approx((0.0, 0.0, 0.0, 0.0))
    clipped = loss_settings("token", rollout_is_cap=None, advantage_clip=0.2)
    assert losses(clipped, tokens()) == pytest.approx((-0.2, -0.2, 0.0, 0.2))


def test_sequence_level_spreads_the_mean_advantage():
    settings = loss_settings("sequence", rollout_is_cap=None)
    known = tokens(sequence_advantages_T=double(2.0))
    assert losses(settings, known) == pytest.approx((-2.0, -2.0, 0.0, 2.0))
    untaught = replace(known, teacher_mask_T=double(0.0))
    assert losses(settings, untaught) == pytest.approx((0.0, 0.0, 0.0, 0.0))


def test_grpo_ignores_the_teacher():
    assert losses(PPO, tokens(group_advantages_T=0.25)) == pytest.approx((-0.25, -0.25, 0.0, 0.25))


def test_the_divergence_is_weighted_and_has_no_policy_gradient_of_its_own():
    settings = loss_settings(is_clip=2.0)
    known = tokens(weights_T=0.5, old_logprobs_T=double(-1.2))
    ratio, correction = math.exp(0.2), math.exp(-0.2)
    loss, slope, weight, shown = losses(settings, known)
    assert weight == pytest.approx(0.5 * ratio * correction) and loss == pytest.approx(0.7 * weight)
    assert slope == 0.0 and shown == pytest.approx(0.5)
    assert losses(settings, tokens(teacher_mask_T=0.0), divergence=float("inf"))[:3] == (0.0, 0.0, 0.0)


def test_the_blend_is_two_terms_with_their_shares():
    terms = build_terms(loss_settings("token", group_advantage_weight=0.9, clip_low=0.1, rollout_is_cap=3.0))
    assert [(term.share, term.loss.settings.name) for term in terms] == [
        (pytest.approx(0.1), "token"),
        (0.9, "grpo"),
    ]
    assert terms[1].loss.settings.clip_low == 0.1 and terms[1].loss.settings.rollout_is_cap == 3.0
    capped = build_terms(loss_settings(group_advantage_weight=0.5, is_clip=2.0))
    assert capped[1].loss.settings.is_clip == 2.0
    clipped = build_terms(loss_settings("clipped_divergence", group_advantage_weight=0.5, clip_high=0.4))
    assert clipped[1].loss.settings.clip_high == 0.4 and clipped[1].loss.settings.is_clip is None
    assert [len(build_terms(loss.Settings())) for loss in LOSSES] == [1] * len(LOSSES)


def test_importance_and_weights_carry_no_gradient_where_they_must_not():
    student_T = double(-0.8).requires_grad_()
    _, correction_T = importance(student_T, tokens(), 2.0)
    assert not correction_T.requires_grad
    assert losses(loss_settings(is_clip=2.0), tokens(), student=-0.8)[1] == 0.0


def test_selected_tokens():
    known = tokens(3, weights_T=double(1.0, 2.0, 3.0))
    assert known.select(torch.tensor([2, 0])).weights_T.tolist() == [3.0, 1.0]
    later = replace(known, old_logprobs_T=double(4.0, 5.0, 6.0), step=7).select(slice(1, 2))
    assert later.old_logprobs_T.tolist() == [5.0] and later.step == 7  # type: ignore[union-attr]


RLSD = loss_settings("rlsd", rollout_is_cap=None, clip_low=0.1, clip_high=0.3)


def rlsd_oracle(student, teacher, old, rollout, advantage, mask, step):
    """(loss, d loss / d student) per token in NumPy float64, from the formulas in arXiv 2604.03128."""
    share = 0.5 * max(0.0, 1 - step / 50)
    weight = np.clip(np.exp(np.sign(advantage) * (teacher - old)), 0.8, 1.2)
    scaled = np.where(mask > 0, advantage * ((1 - share) + share * weight), advantage)
    ratio = np.exp(student - rollout)
    clipped = np.clip(ratio, 0.9, 1.3)
    inside = ratio * scaled <= clipped * scaled
    return -np.minimum(ratio * scaled, clipped * scaled), np.where(inside, -ratio * scaled, 0.0)


def test_rlsd_is_its_formula_at_every_step():
    rng = np.random.default_rng(0)
    student, teacher, old, rollout, advantage = rng.normal(-1, 0.3, (5, 200))
    mask = (rng.random(200) < 0.7).astype(float)
    for step in (0, 10, 49, 50, 80):
        student_T = torch.tensor(student).requires_grad_()
        known = tokens(
            200,
            rollout_logprobs_T=torch.tensor(rollout),
            old_logprobs_T=torch.tensor(old),
            group_advantages_T=torch.tensor(advantage),
            teacher_mask_T=torch.tensor(mask),
            step=step,
        )
        scores = Scores(
            student_logprobs_T=student_T,
            teacher_logprobs_T=torch.tensor(teacher * mask),
            divergences_T=torch.zeros(200),
        )
        loss_T, _ = build_terms(RLSD)[0].loss.token_losses(scores, known)
        loss_T.sum().backward()
        wanted, slope = rlsd_oracle(student, teacher, old, rollout, advantage, mask, step)
        assert student_T.grad is not None
        np.testing.assert_allclose(loss_T.detach().numpy(), wanted, rtol=1e-12, atol=1e-14, err_msg=str(step))
        np.testing.assert_allclose(student_T.grad.numpy(), slope, rtol=1e-12, atol=1e-14, err_msg=str(step))


def test_every_loss_is_found_by_its_settings_and_declares_what_it_needs():
    for loss in LOSSES:
        settings = loss.Settings()
        (term,) = build_terms(settings)
        assert type(term.loss) is loss and term.loss.settings is settings
        assert term.loss.teacher_views or term.loss.uses_rewards
        assert not term.loss.needs_sequence_advantages or term.loss.teacher_views
