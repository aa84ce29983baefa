"""The paper's clipped objective at the level of distributions, for several optimizer steps on one batch (arXiv
2601.20802, equations 12 and 13): PPO's surrogate for every outcome, weighted by the policy that sampled,

    - sum over v of pi_old(v) min(w(v) A(v), clip(w(v), 1 - clip_low, 1 + clip_high) A(v)),
    w = pi / pi_old,   A = log q - log pi (held constant),

over the K likeliest tokens of pi_old and all others as one outcome. At the first optimizer step w is 1, and value and
gradient are those of reverse KL on the same outcomes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from sdpo_megatron.algorithm.advantages import sdpo_advantages
from sdpo_megatron.algorithm.losses.base import (
    BlendSettings,
    ClippedLikeliestTokens,
    Comparison,
    Loss,
    LossInputs,
    LossSettings,
    Scores,
)
from sdpo_megatron.algorithm.losses.policy_gradient import importance
from sdpo_megatron.strict_yaml.section import Fraction, NonNegativeFloat, Positive

if TYPE_CHECKING:
    from torch import Tensor


class ClippedDivergenceSettings(LossSettings, BlendSettings):
    name: Literal["clipped_divergence"] = "clipped_divergence"
    top_k: Positive = 20
    """Outcomes are this many likeliest tokens of the policy that sampled, and all others as one more."""
    clip_low: Fraction = 0.2
    clip_high: NonNegativeFloat = 0.28


class ClippedDivergence(Loss):
    Settings = ClippedDivergenceSettings
    teacher_views = 1
    needs_old_distribution = True

    @property
    def comparison(self) -> Comparison:
        return ClippedLikeliestTokens(self.settings.top_k, self.settings.clip_low, self.settings.clip_high)

    def token_losses(self, scores: Scores, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        """The surrogate comes as `divergences_T`; what is left to do is the correction for the server's own
        rounding."""
        student_T = scores.student_logprobs_T
        advantages_T = sdpo_advantages(scores.teacher_logprobs_T, student_T, inputs.teacher_mask_T)
        ratio_T, correction_T = importance(student_T, inputs, self.settings.rollout_is_cap)
        weights_T = (inputs.weights_T * inputs.teacher_mask_T * correction_T).detach()
        surrogate_T = scores.divergences_T
        surrogate_T = surrogate_T.where(weights_T > 0, surrogate_T.new_zeros(surrogate_T.shape))
        outside_T = (ratio_T < 1 - self.settings.clip_low) | (ratio_T > 1 + self.settings.clip_high)
        details = {
            "ratio": ratio_T.detach(),
            "clipped": outside_T.to(ratio_T.dtype),
            "correction": correction_T,
        }
        return weights_T * surrogate_T, {"advantage": advantages_T, **details}
