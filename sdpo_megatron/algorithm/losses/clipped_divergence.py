"""The paper's clipped objective at the level of distributions, for several optimizer steps on one batch (arXiv
2601.20802, equations 12 and 13): PPO's surrogate for every outcome, weighted by the policy that sampled,

    - sum over v of pi_old(v) min(w(v) A(v), clip(w(v), 1 - clip_low, 1 + clip_high) A(v)),
    w = pi / pi_old,   A = log q - log pi (held constant),

over the K likeliest tokens of pi_old and all others as one outcome. At the first optimizer step w is 1, and value and
gradient are those of reverse KL on the same outcomes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from sdpo_megatron.algorithm.losses.base import (
    BlendSettings,
    ClippedLikeliestTokens,
    Comparison,
    Loss,
    LossInputs,
    LossSettings,
    Scores,
)
from sdpo_megatron.algorithm.losses.importance_weighted import divergence_loss
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

        def bounded(ratio_T: Tensor) -> tuple[float, Tensor]:
            return 1.0, (ratio_T < 1 - self.settings.clip_low) | (ratio_T > 1 + self.settings.clip_high)

        return divergence_loss(scores, inputs, self.settings.rollout_is_cap, bounded)
