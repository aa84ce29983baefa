"""RLSD: the reward says whether a response is reinforced, the teacher how much each of its tokens is (arXiv
2604.03128).

    w = clip(exp(sign(A) (log q - log pi_old)), 1 - weight_clip, 1 + weight_clip)
    A' = A ((1 - l) + l w),   PPO's clip on A'

with the group-relative A, and l falling linearly from `teacher_share` to 0 over `teacher_steps` training steps. Tokens
that no teacher reads keep A.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from sdpo_megatron.algorithm.losses.base import ClipSettings, Loss, LossInputs, LossSettings, Scores
from sdpo_megatron.algorithm.losses.importance_weighted import policy_gradient_loss
from sdpo_megatron.strict_yaml.section import Fraction, Positive

if TYPE_CHECKING:
    from torch import Tensor


class RlsdSettings(LossSettings, ClipSettings):
    name: Literal["rlsd"] = "rlsd"
    teacher_share: Fraction = 0.5
    """How much of an advantage the teacher's weight scales, at the first step."""
    teacher_steps: Positive = 50
    """Training steps after which the teacher no longer counts."""
    weight_clip: Fraction = 0.2
    """The most by which a token's weight may differ from 1."""


class Rlsd(Loss):
    Settings = RlsdSettings
    teacher_views = 1
    uses_rewards = True

    def token_losses(self, scores: Scores, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        settings, advantages_T = self.settings, inputs.group_advantages_T
        old_T = scores.student_logprobs_T if inputs.old_logprobs_T is None else inputs.old_logprobs_T
        gap_T = (scores.teacher_logprobs_T - old_T.detach()) * advantages_T.sign()
        weights_T = gap_T.exp().clamp(1 - settings.weight_clip, 1 + settings.weight_clip)
        share_T = self.teacher_share(inputs.step) * inputs.teacher_mask_T
        weighted_T = advantages_T * (1.0 + share_T * (weights_T - 1.0))
        advantages_T = weighted_T.where(inputs.teacher_mask_T > 0, advantages_T)
        return policy_gradient_loss(scores.student_logprobs_T, advantages_T, inputs, settings)

    def teacher_share(self, step: int) -> float:
        """Returns l at a training step; steps count from 0."""
        return self.settings.teacher_share * max(0.0, 1.0 - step / self.settings.teacher_steps)
