"""Policy gradients with the policy's ratio kept in bounds, and the ratio itself: what several losses share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdpo_megatron.algorithm.losses.base import LossInputs

if TYPE_CHECKING:
    from torch import Tensor

_MAX_LOG_RATIO = 20.0
"""exp(20) = 5e8: keeps one token that went astray from turning the sum infinite."""


def policy_gradient_loss(
    student_logprobs_T: Tensor, advantages_T: Tensor, inputs: LossInputs, settings: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns per token weight * correction * -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) (PPO, arXiv 1707.06347,
    with separate clips; arXiv 2601.20802, equation 12).

    With `is_clip` it is -min(r, is_clip) A instead, with the capped ratio held constant while log pi is differentiated.
    r and the correction are `importance`'s. Returns loss_T and, detached, `ratio`, `clipped` (1 where the clip stops
    the gradient, or the cap cuts the ratio) and `correction`.
    """
    active_T = inputs.weights_T > 0
    zeros_T = student_logprobs_T.new_zeros(student_logprobs_T.shape)
    ratio_T, correction_T = importance(student_logprobs_T, inputs, settings.rollout_is_cap)
    advantages_T = advantages_T.detach().where(active_T, zeros_T.to(advantages_T.dtype))
    if settings.is_clip is None:
        clipped_T = ratio_T.clamp(1 - settings.clip_low, 1 + settings.clip_high)
        gain_T = (ratio_T * advantages_T).minimum(clipped_T * advantages_T)
        stopped_T = clipped_T * advantages_T < ratio_T * advantages_T
    else:
        capped_T = ratio_T.clamp(max=settings.is_clip).detach()
        masked_T = student_logprobs_T.where(active_T, zeros_T)
        gain_T = capped_T * advantages_T * (1.0 + masked_T - masked_T.detach())
        stopped_T = ratio_T > settings.is_clip
    details = {"ratio": ratio_T.detach(), "clipped": stopped_T.to(ratio_T.dtype), "correction": correction_T}
    return -(inputs.weights_T * correction_T * gain_T), details


def importance(
    student_logprobs_T: Tensor, inputs: LossInputs, rollout_is_cap: float | None
) -> tuple[Tensor, Tensor]:
    """Returns (r_T, correction_T): the policy's ratio, and the detached weight that corrects for what the server
    computes otherwise.

    With `rollout_is_cap` r = pi / pi_old, and the correction is min(pi_old / pi_rollout, cap) (truncated importance
    sampling, arXiv 2601.20802, A.4); without it r = pi / pi_rollout, and the correction is 1.
    """
    active_T = inputs.weights_T > 0
    zeros_T = student_logprobs_T.new_zeros(student_logprobs_T.shape)
    old_T = student_logprobs_T.detach() if inputs.old_logprobs_T is None else inputs.old_logprobs_T
    if rollout_is_cap is None:
        base_T, correction_T = inputs.rollout_logprobs_T, zeros_T.new_ones(zeros_T.shape)
    else:
        gap_T = (old_T - inputs.rollout_logprobs_T).where(active_T, zeros_T).detach()
        base_T, correction_T = old_T, gap_T.exp().clamp(max=rollout_is_cap)
    log_ratio_T = (student_logprobs_T - base_T.detach()).where(active_T, zeros_T)
    return log_ratio_T.clamp(max=_MAX_LOG_RATIO).exp(), correction_T


def clip_advantages(advantages_T: Tensor, limit: float | None) -> Tensor:
    return advantages_T if limit is None else advantages_T.clamp(-limit, limit)
