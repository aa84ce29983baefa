"""SDPO at the sampled tokens: a policy gradient whose advantage is the teacher's log-ratio, token by token (arXiv
2601.20802, token level). A noisy estimate of reverse KL's gradient; the paper finds the distributions' own better."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from sdpo_megatron.algorithm.losses.base import (
    BlendSettings,
    ClipSettings,
    Loss,
    LossInputs,
    LossSettings,
    Scores,
)
from sdpo_megatron.algorithm.losses.importance_weighted import policy_gradient_loss, sdpo_advantages
from sdpo_megatron.strict_yaml.section import PositiveFloat

if TYPE_CHECKING:
    from torch import Tensor


class TokenSettings(LossSettings, ClipSettings, BlendSettings):
    name: Literal["token"] = "token"
    advantage_clip: PositiveFloat | None = None
    """Largest advantage of a token, either way, in nats."""


class TokenSdpo(Loss):
    Settings = TokenSettings
    teacher_views = 1

    def token_losses(self, scores: Scores, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        advantages_T, limit = self.advantages(scores, inputs), self.settings.advantage_clip
        if limit is not None:
            advantages_T = advantages_T.clamp(-limit, limit)
        return policy_gradient_loss(scores.student_logprobs_T, advantages_T, inputs, self.settings)

    def advantages(self, scores: Scores, inputs: LossInputs) -> Tensor:
        """Returns teacher - student in nats, 0 where no teacher reads the token."""
        return sdpo_advantages(scores, inputs)
