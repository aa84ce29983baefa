"""SDPO with one advantage per response: the mean of its tokens' log-ratios (arXiv 2601.20802, sequence level)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from sdpo_megatron.algorithm.losses.base import LossInputs, Scores
from sdpo_megatron.algorithm.losses.token import TokenSdpo, TokenSettings

if TYPE_CHECKING:
    from torch import Tensor


class SequenceSettings(TokenSettings):
    name: Literal["sequence"] = "sequence"  # type: ignore[assignment]


class SequenceSdpo(TokenSdpo):
    Settings = SequenceSettings
    needs_sequence_advantages = True

    def advantages(self, scores: Scores, inputs: LossInputs) -> Tensor:
        """Returns the mean of the response's log-ratios for each of its taught tokens. A micro-batch without a teacher
        has no taught token, and no mean was made for it."""
        if inputs.sequence_advantages_T is None:
            return scores.student_logprobs_T.new_zeros(scores.student_logprobs_T.shape)
        return inputs.sequence_advantages_T * inputs.teacher_mask_T
