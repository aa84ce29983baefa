"""SDPO's own loss: how far the student's next-token distribution is from the teacher's, summed over a response (arXiv
2601.20802, equation 1; over the likeliest tokens, equation 11).

The divergence is differentiated as it is; nothing limits the policy's ratio but `is_clip`, a constant weight, as in the
authors' code. With several optimizer steps on a batch `clipped_divergence` is the paper's objective.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from sdpo_megatron.algorithm.losses.base import (
    BlendSettings,
    ClipSettings,
    Comparison,
    LikeliestTokens,
    Loss,
    LossInputs,
    LossSettings,
    Scores,
    WholeVocabulary,
)
from sdpo_megatron.algorithm.losses.importance_weighted import divergence_loss
from sdpo_megatron.strict_yaml.section import Fraction, Positive

if TYPE_CHECKING:
    from torch import Tensor


class DivergenceSettings(LossSettings, ClipSettings, BlendSettings):
    name: Literal["divergence"] = "divergence"
    alpha: Fraction = 1.0
    """The divergence: 0 = KL(teacher || student), 1 = KL(student || teacher), between = Jensen-Shannon."""
    top_k: Positive | None = None
    """The divergence is taken on this many likeliest tokens; unset, on the whole vocabulary, exactly."""
    top_k_rest: Literal["tail", "renormalise"] = "tail"
    """Whether all other tokens count as one outcome (`tail`) or are left out (`renormalise`)."""
    top_k_support: Literal["student", "teacher"] = "student"
    """Whose likeliest tokens these are."""

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> DivergenceSettings:
        given = self.model_fields_set
        for key in ("top_k_rest", "top_k_support"):
            if key in given and self.top_k is None:
                raise ValueError(
                    f"loss.{key} says how loss.top_k works, which is not set; set it, or remove {key}"
                )
        for key in ("clip_low", "clip_high"):
            if key in given and self.group_advantage_weight == 0:
                raise ValueError(
                    f"loss.{key} clips a policy gradient, which loss.name=divergence has only with "
                    f"loss.group_advantage_weight above 0; remove it, or take loss.name=clipped_divergence"
                )
        return self


class Divergence(Loss):
    Settings = DivergenceSettings
    teacher_views = 1
    bounds_policy_ratio = False

    @property
    def raises_unsampled(self) -> bool:
        """Forward KL's gradient by a token's logit is p - q; all others' have the factor p, and so has the rest as one
        outcome beside the student's likeliest tokens."""
        of_all = self.settings.top_k is None or self.settings.top_k_support == "teacher"
        return self.settings.alpha == 0 and of_all

    @property
    def comparison(self) -> Comparison:
        settings = self.settings
        if settings.top_k is None:
            return WholeVocabulary(settings.alpha)
        return LikeliestTokens(settings.alpha, settings.top_k, settings.top_k_rest, settings.top_k_support)

    def token_losses(self, scores: Scores, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        cap = self.settings.is_clip

        def bounded(ratio_T: Tensor) -> tuple[Tensor | float, Tensor]:
            return (1.0, ratio_T < 0) if cap is None else (ratio_T.clamp(max=cap), ratio_T > cap)

        return divergence_loss(scores, inputs, self.settings.rollout_is_cap, bounded)
