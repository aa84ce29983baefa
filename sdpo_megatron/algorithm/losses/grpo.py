"""GRPO: a policy gradient whose advantage is the reward minus its group's mean (arXiv 2402.03300, without division by
the standard deviation: arXiv 2503.20783)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from sdpo_megatron.algorithm.losses.base import ClipSettings, Loss, LossInputs, LossSettings, Scores
from sdpo_megatron.algorithm.losses.importance_weighted import policy_gradient_loss

if TYPE_CHECKING:
    from torch import Tensor


class GrpoSettings(LossSettings, ClipSettings):
    name: Literal["grpo"] = "grpo"


class Grpo(Loss):
    Settings = GrpoSettings
    uses_rewards = True

    def token_losses(self, scores: Scores, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        advantages_T = inputs.group_advantages_T
        return policy_gradient_loss(scores.student_logprobs_T, advantages_T, inputs, self.settings)
