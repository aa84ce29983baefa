"""The losses, a file each, and the registry: a new loss is a file here, a line below, and a test.

`loss.name` chooses one, and only its own settings can be given. SDPO's losses may be blended with GRPO (arXiv
2601.20802, equation 3): two terms, each the mean over the tokens that it counts, SDPO's over those that the teacher
reads, GRPO's over all of the policy's. Where no clip acts the gradient is that of the blended advantage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Union

from sdpo_megatron.algorithm.losses.base import Loss, LossSettings, Term
from sdpo_megatron.algorithm.losses.clipped_divergence import ClippedDivergence
from sdpo_megatron.algorithm.losses.divergence import Divergence
from sdpo_megatron.algorithm.losses.grpo import Grpo
from sdpo_megatron.algorithm.losses.rlsd import Rlsd
from sdpo_megatron.algorithm.losses.sequence import SequenceSdpo
from sdpo_megatron.algorithm.losses.token import TokenSdpo

LOSSES: tuple[type[Loss], ...] = (Divergence, ClippedDivergence, TokenSdpo, SequenceSdpo, Grpo, Rlsd)

if TYPE_CHECKING:
    AnyLossSettings = LossSettings
else:
    AnyLossSettings = Union[tuple(loss.Settings for loss in LOSSES)]  # noqa: UP007  made at run time
DEFAULT_LOSS: Any = Divergence.Settings()


def build_terms(settings: LossSettings) -> list[Term]:
    """Returns the terms of what is minimised: the chosen loss, or its blend with GRPO; the loss that `loss.name` names
    comes first."""
    (kind,) = (loss for loss in LOSSES if loss.Settings is type(settings))
    own, grpo_share = kind(settings), getattr(settings, "group_advantage_weight", 0.0)
    if grpo_share == 0:
        return [Term(1.0, own)]
    return [Term(1.0 - grpo_share, own), Term(grpo_share, Grpo(_grpo_beside(settings)))]


def _grpo_beside(settings: LossSettings) -> LossSettings:
    """GRPO's settings in a blend: the clip and the correction of the loss that it is blended with."""
    own = settings.model_dump()
    clip = ["is_clip"] if own.get("is_clip") is not None else ["clip_low", "clip_high"]
    return Grpo.Settings(**{key: own[key] for key in ("rollout_is_cap", *clip)})
