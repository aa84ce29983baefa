"""What each response token adds to the loss, from what the models say about it: the [T]-sized part of every objective.

    token, sequence     policy gradient, the teacher's log-ratio as advantage: per token, or its mean over a response
    divergence          the distance of two next-token distributions, which the kernels compute (A.1-A.3 of the paper)
    grpo                policy gradient with the group-relative reward as advantage

All are differentiable by the student's log-probability and by the divergence; the kernels turn that slope into the
gradient by logits. Nothing is divided here: the caller knows the global sum of weights. Paper: arXiv 2601.20802.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from sdpo_megatron.algorithm.advantages import sdpo_advantages
from sdpo_megatron.config import LossSettings

_MAX_LOG_RATIO = 20.0
"""exp(20) = 5e8: keeps one token that went astray from turning the sum infinite."""


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What is known of each response token besides what the models say, [T] each; tokens of weight 0 have no influence,
    whatever else they hold (NaN too)."""

    weights_T: Tensor
    taught_T: Tensor
    """1 where the teacher knows more than the student and the token fits its context."""
    rollout_T: Tensor
    """The server's log-probability."""
    old_T: Tensor | None
    """The policy's before this batch's first optimizer step; None: the student's own."""
    group_advantage_T: Tensor
    """reward - mean of the group."""
    sequence_advantage_T: Tensor | None = None
    """Mean over the response of the token advantages, for the sequence level."""

    def select(self, index: Tensor) -> "Tokens":
        def at(values_T: Tensor | None) -> Any:
            return None if values_T is None else values_T[index]

        return Tokens(**{field.name: at(getattr(self, field.name)) for field in fields(self)})


def token_losses(
    student_T: Tensor, teacher_T: Tensor, divergence_T: Tensor, tokens: Tokens, settings: LossSettings
) -> tuple[Tensor, dict[str, Tensor]]:
    """loss_T, weighted, and detached numbers for the records: `advantage`, `ratio`, `clipped`, `correction`.

    `teacher_T` and `divergence_T` count only where a token is taught. With `group_advantage_weight` = l the loss is
    l * grpo + (1 - l) * sdpo (equation 3): blended advantages where SDPO is a policy gradient too, else two terms.
    """
    blend = settings.group_advantage_weight if settings.name == "sdpo" else 1.0
    advantages_T = sdpo_advantages(teacher_T, student_T, tokens.taught_T)
    if settings.objective == "sequence" and tokens.sequence_advantage_T is not None:
        advantages_T = tokens.sequence_advantage_T * tokens.taught_T
    advantages_T = clip_advantages(advantages_T, settings.advantage_clip)
    shown_T = advantages_T if settings.name == "sdpo" else tokens.group_advantage_T
    if settings.name == "sdpo" and settings.objective == "divergence":
        loss_T, details = policy_gradient_loss(student_T, blend * tokens.group_advantage_T, tokens, settings)
        weight_T = divergence_weights(student_T, tokens, settings)
        distance_T = torch.where(weight_T > 0, divergence_T, torch.zeros_like(divergence_T))
        loss_T = loss_T + (1.0 - blend) * weight_T * distance_T
    else:
        mixed_T = blend * tokens.group_advantage_T + (1.0 - blend) * advantages_T
        loss_T, details = policy_gradient_loss(student_T, mixed_T, tokens, settings)
    return loss_T, {"advantage": shown_T, **details}


def clip_advantages(advantages_T: Tensor, limit: float | None) -> Tensor:
    return advantages_T if limit is None else advantages_T.clamp(-limit, limit)


def policy_gradient_loss(
    student_T: Tensor, advantages_T: Tensor, tokens: Tokens, settings: LossSettings
) -> tuple[Tensor, dict[str, Tensor]]:
    """Per token weight * correction * -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) (PPO, arXiv 1707.06347, with
    separate clips; equations 12 and 13).

    With `is_clip` instead -min(r, is_clip) A with the capped ratio held constant while log pi is differentiated. r and
    the correction are `importance`'s. Returns loss_T and, detached, `ratio`, `clipped` (1 where the clip stops the
    gradient, or the cap cuts the ratio) and `correction`.
    """
    active_T = tokens.weights_T > 0
    ratio_T, correction_T = importance(student_T, tokens, settings)
    advantages_T = torch.where(active_T, advantages_T.detach(), torch.zeros_like(advantages_T))
    if settings.is_clip is None:
        clipped_T = ratio_T.clamp(1 - settings.clip_low, 1 + settings.clip_high)
        gain_T = torch.minimum(ratio_T * advantages_T, clipped_T * advantages_T)
        stopped_T = clipped_T * advantages_T < ratio_T * advantages_T
    else:
        capped_T = ratio_T.clamp(max=settings.is_clip).detach()
        masked_T = torch.where(active_T, student_T, torch.zeros_like(student_T))
        gain_T = capped_T * advantages_T * (1.0 + masked_T - masked_T.detach())
        stopped_T = ratio_T > settings.is_clip
    details = {"ratio": ratio_T.detach(), "clipped": stopped_T.to(ratio_T.dtype), "correction": correction_T}
    return -(tokens.weights_T * correction_T * gain_T), details


def divergence_weights(student_T: Tensor, tokens: Tokens, settings: LossSettings) -> Tensor:
    """What multiplies each token's divergence, detached: its weight, where it is taught, times min(r, is_clip), times
    the correction."""
    ratio_T, correction_T = importance(student_T, tokens, settings)
    capped_T = torch.ones_like(ratio_T) if settings.is_clip is None else ratio_T.clamp(max=settings.is_clip)
    return (tokens.weights_T * tokens.taught_T * capped_T * correction_T).detach()


def importance(student_T: Tensor, tokens: Tokens, settings: LossSettings) -> tuple[Tensor, Tensor]:
    """(r_T, correction_T): the policy's ratio, and the detached weight for what the server computes otherwise.

    With `rollout_is_cap` r = pi / pi_old, and the correction is min(pi_old / pi_rollout, cap) (truncated importance
    sampling, A.4); without it r = pi / pi_rollout, and the correction is 1.
    """
    active_T = tokens.weights_T > 0
    zeros_T = torch.zeros_like(student_T)
    old_T = student_T.detach() if tokens.old_T is None else tokens.old_T
    if settings.rollout_is_cap is None:
        base_T, correction_T = tokens.rollout_T, torch.ones_like(student_T)
    else:
        gap_T = torch.where(active_T, old_T - tokens.rollout_T, zeros_T).detach()
        base_T, correction_T = old_T, gap_T.exp().clamp(max=settings.rollout_is_cap)
    log_ratio_T = torch.where(active_T, student_T - base_T.detach(), zeros_T)
    return log_ratio_T.clamp(max=_MAX_LOG_RATIO).exp(), correction_T
