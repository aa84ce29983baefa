"""Policy gradients with the policy's ratio kept in bounds, the ratio itself, and the teacher's advantage: what several
losses share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sdpo_megatron.algorithm.losses.base import LossInputs, Scores

if TYPE_CHECKING:
    from torch import Tensor

_MAX_LOG_RATIO = 20.0
"""exp(20) = 5e8: keeps one token that went astray from turning the sum infinite."""


def sdpo_advantages(scores: Scores, inputs: LossInputs) -> Tensor:
    """Returns `teacher - student` in nats for each sampled token, without gradient; 0 where no teacher reads the token,
    whatever is said of it there (arXiv 2601.20802, token-level form of proposition 2.1)."""
    difference_T = (scores.teacher_logprobs_T - scores.student_logprobs_T).detach()
    return difference_T.where(inputs.teacher_mask_T > 0, 0.0)


def policy_gradient_loss(
    student_logprobs_T: Tensor, advantages_T: Tensor, inputs: LossInputs, settings: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns per token weight * correction * -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) (PPO, arXiv 1707.06347,
    with separate clips; arXiv 2601.20802, equation 12).

    With `is_clip` it is -min(r, is_clip) A instead, with the capped ratio held constant while log pi is differentiated.
    r and the correction are `importance`'s. Returns what `Loss.token_losses` does; `clipped` is 1 where the clip stops
    the gradient, or the cap cuts the ratio.
    """
    active_T = inputs.weights_T > 0
    ratio_T, correction_T = importance(student_logprobs_T, inputs, settings.rollout_is_cap)
    details = {"advantage": advantages_T.detach(), "ratio": ratio_T.detach(), "correction": correction_T}
    advantages_T = advantages_T.detach().where(active_T, 0.0)
    if settings.is_clip is None:
        clipped_T = ratio_T.clamp(1 - settings.clip_low, 1 + settings.clip_high)
        gain_T = (ratio_T * advantages_T).minimum(clipped_T * advantages_T)
        stopped_T = clipped_T * advantages_T < ratio_T * advantages_T
    else:
        capped_T = ratio_T.clamp(max=settings.is_clip).detach()
        masked_T = student_logprobs_T.where(active_T, 0.0)
        gain_T = capped_T * advantages_T * (1.0 + masked_T - masked_T.detach())
        stopped_T = ratio_T > settings.is_clip
    return -(inputs.weights_T * correction_T * gain_T), details | {"clipped": stopped_T.to(ratio_T.dtype)}


def divergence_loss(
    scores: Scores,
    inputs: LossInputs,
    rollout_is_cap: float | None,
    bounded: Callable[[Tensor], tuple[Tensor | float, Tensor]],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns what `Loss.token_losses` does of a loss whose tokens' divergences are differentiated themselves, at those
    that the teacher reads. `bounded` makes of the ratio the constant weight that it gives a token, and `clipped`."""
    ratio_T, correction_T = importance(scores.student_logprobs_T, inputs, rollout_is_cap)
    factor_T, clipped_T = bounded(ratio_T)
    weights_T = (inputs.weights_T * inputs.teacher_mask_T * factor_T * correction_T).detach()
    details = {
        "advantage": sdpo_advantages(scores, inputs),
        "ratio": ratio_T.detach(),
        "correction": correction_T,
    }
    loss_T = weights_T * scores.divergences_T.where(weights_T > 0, 0.0)
    return loss_T, details | {"clipped": clipped_T.to(ratio_T.dtype)}


def importance(
    student_logprobs_T: Tensor, inputs: LossInputs, rollout_is_cap: float | None
) -> tuple[Tensor, Tensor]:
    """Returns (r_T, correction_T): the policy's ratio, and the detached weight that corrects for what the server
    computes otherwise.

    With `rollout_is_cap` r = pi / pi_old, and the correction is min(pi_old / pi_rollout, cap) (truncated importance
    sampling, arXiv 2601.20802, A.4); without it r = pi / pi_rollout, and the correction is 1.
    """
    active_T = inputs.weights_T > 0
    old_T = student_logprobs_T.detach() if inputs.old_logprobs_T is None else inputs.old_logprobs_T
    if rollout_is_cap is None:
        base_T = inputs.rollout_logprobs_T
        correction_T = student_logprobs_T.new_ones(student_logprobs_T.shape)
    else:
        gap_T = (old_T - inputs.rollout_logprobs_T).where(active_T, 0.0).detach()
        base_T, correction_T = old_T, gap_T.exp().clamp(max=rollout_is_cap)
    log_ratio_T = (student_logprobs_T - base_T.detach()).where(active_T, 0.0)
    return log_ratio_T.clamp(max=_MAX_LOG_RATIO).exp(), correction_T
