"""What a loss declares, is told of each token, and gives back.

A loss works on numbers per response token. It says what it needs of the models, and the trainer computes just that; it
never asks which loss it has. No file here imports torch: settings are checked before torch, which takes seconds, is
loaded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import model_validator

from sdpo_megatron.records import Sample
from sdpo_megatron.strict_yaml.section import Fraction, NonNegativeFloat, PositiveFloat, Section

if TYPE_CHECKING:
    from torch import Tensor

# Settings


class LossSettings(Section):
    """The settings that every loss has; a loss adds its own, and `name: Literal[...]`."""

    rollout_is_cap: PositiveFloat | None = 2.0
    """Cap of the weight that corrects for log-probabilities of the server that differ from the trainer's; the ratio is
    then the policy's over this batch's optimizer steps. Unset: no such weight, and the ratio is against the server."""


class ClipSettings(Section):
    """Settings of how far the policy's ratio may move a policy gradient."""

    clip_low: Fraction = 0.2
    clip_high: NonNegativeFloat = 0.28
    is_clip: PositiveFloat | None = None
    """Cap of the policy's ratio as a constant weight, in the place of PPO's clip."""

    @model_validator(mode="after")
    def _one_way_to_clip(self) -> ClipSettings:
        given = sorted(self.model_fields_set & {"clip_low", "clip_high"})
        if self.is_clip is not None and given:
            raise ValueError(
                f"loss.{given[0]} has no effect beside loss.is_clip, which takes its place; remove one"
            )
        return self


class BlendSettings(Section):
    group_advantage_weight: Fraction = 0.0
    """Share of the group-relative advantage (GRPO) in the loss; the paper's lambda."""


# What is asked of the models' logits


@dataclass(frozen=True)
class SampledTokens:
    """The loss asks for the log-probabilities of the sampled tokens alone."""


@dataclass(frozen=True)
class WholeVocabulary:
    """The loss also asks for the divergence of student and teacher over the whole vocabulary; `alpha`: 0 is KL(teacher
    || student), 1 is KL(student || teacher), between Jensen-Shannon."""

    alpha: float


@dataclass(frozen=True)
class LikeliestTokens:
    """The loss also asks for their divergence on the `k` likeliest tokens, all others being one more outcome, or left
    out."""

    alpha: float
    k: int
    rest: Literal["tail", "renormalise"]
    support: Literal["student", "teacher"]


@dataclass(frozen=True)
class ClippedLikeliestTokens:
    """The loss also asks for the clipped surrogate of reverse KL on the policy's `k` likeliest tokens and all others as
    one outcome, with the policy's distributions before the batch's first optimizer step as the ones that were sampled
    from."""

    k: int
    clip_low: float
    clip_high: float


Comparison = SampledTokens | WholeVocabulary | LikeliestTokens | ClippedLikeliestTokens


# What a loss is told


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """What is known of each response token before the models are asked, [T] each. Tokens of weight 0 have no influence,
    whatever else they hold (NaN too)."""

    weights_T: Tensor
    """How often a token counts in this loss; 0 for tokens that it does not count at all."""
    teacher_mask_T: Tensor
    """1 where the teacher knows more than the student and the token fits its context."""
    rollout_logprobs_T: Tensor
    """The log-probabilities that the server gave."""
    old_logprobs_T: Tensor | None
    """The policy's log-probabilities before this batch's first optimizer step; None stands for the student's own."""
    group_advantages_T: Tensor
    """The response's reward minus the mean of its group."""
    sequence_advantages_T: Tensor | None = None
    """Mean over the response of the teacher's log-ratios, for a loss that `needs_sequence_advantages`."""
    step: int = 0
    """The training step, for coefficients that change with it."""

    def select(self, index: Any) -> LossInputs:
        """Returns the inputs of the tokens that `index` picks."""
        known: dict[str, Any] = vars(self)
        picked = {name: value[index] for name, value in known.items() if value is not None and name != "step"}
        return replace(self, **picked)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What the models say of each response token, [T] each; a loss may differentiate by the student's log-probabilities
    and by the divergences."""

    student_logprobs_T: Tensor
    teacher_logprobs_T: Tensor
    """Log-probabilities; 0 where no teacher reads the token."""
    divergences_T: Tensor
    """Divergences in nats; 0 where the loss compares sampled tokens only."""


# The loss itself


class Loss(ABC):
    """One term of what is minimised: the sum of its tokens' losses over the sum of its tokens' weights."""

    Settings: ClassVar[type[LossSettings]]
    teacher_views: ClassVar[int] = 0
    """How many different prompts the teacher reads each response under; 0: the loss has no teacher."""
    uses_rewards: ClassVar[bool] = False
    needs_sequence_advantages: ClassVar[bool] = False
    needs_old_distribution: ClassVar[bool] = False
    """Whether the policy's distributions before the batch's first optimizer step are asked for."""
    bounds_policy_ratio: ClassVar[bool] = True
    """Whether something limits how far several optimizer steps on one batch move the policy."""

    def __init__(self, settings: Any):
        self.settings = settings

    @property
    def comparison(self) -> Comparison:
        """What the loss asks of the logits."""
        return SampledTokens()

    @property
    def raises_unsampled(self) -> bool:
        """Whether the gradient of a token can be large though the policy hardly samples it; where it cannot, nothing
        is learned of what the policy never does."""
        return False

    @property
    def compares_distributions(self) -> bool:
        """Whether the loss asks for divergences, so that `divergences_T` holds them."""
        return not isinstance(self.comparison, SampledTokens)

    @property
    def top_k_tokens(self) -> int:
        """How many likeliest tokens the loss compares one by one; 0 where it compares all tokens, or the sampled ones
        alone."""
        return getattr(self.comparison, "k", 0)

    def weights(self, mask_T: Tensor, teacher_mask_T: Tensor) -> Tensor:
        """Returns how often each token counts; their sum over a mini-batch divides the loss. `mask_T` marks the
        policy's tokens."""
        return mask_T if self.uses_rewards else mask_T * teacher_mask_T

    def has_signal(self, sample: Sample) -> bool:
        """Returns whether the sample can have a gradient; others are not computed, though their tokens count."""
        return sample.group_advantage != 0 if self.uses_rewards else is_taught(sample)

    @abstractmethod
    def token_losses(self, scores: Scores, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns loss_T, weighted, and detached numbers to record: `advantage`, `ratio`, `clipped`, `correction`.

        Nothing is divided here: the trainer knows the sum of weights over all ranks."""


@dataclass(frozen=True)
class Term:
    """A loss and its share in what is minimised."""

    share: float
    loss: Loss


def is_taught(sample: Sample) -> bool:
    return sample.teacher_prompt_ids is not None and sample.teacher_tokens > 0
