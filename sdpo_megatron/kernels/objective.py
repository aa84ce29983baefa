"""What a loss asks of the logits of student and teacher, behind two methods: rows' numbers, and the gradient by the
student's logits in place. `from_hidden` calls them chunk by chunk."""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from sdpo_megatron.algorithm.losses.base import (
    ClippedLikeliestTokens,
    Comparison,
    LikeliestTokens,
    SampledTokens,
    WholeVocabulary,
)
from sdpo_megatron.kernels.clipped_top_k import ClippedTopK
from sdpo_megatron.kernels.divergence import FullVocabulary
from sdpo_megatron.kernels.rows import LogitRows, RowNumbers, ShardSums
from sdpo_megatron.kernels.softmax import join, sweep, write_gradient_
from sdpo_megatron.kernels.top_k import TopK
from sdpo_megatron.kernels.unreached import row_unreached


class Objective(Protocol):
    def evaluate(self, logits: LogitRows) -> RowNumbers:
        """Returns the numbers of all rows. The logits are afterwards what they were."""
        ...

    def write_gradient_(self, logits: LogitRows, rows: Any, weight_U: Tensor, slope_U: Tensor) -> None:
        """Overwrites the student's logits by the loss's gradient, and padding columns by 0.

        `rows` is what `evaluate` gave for these logits; `weight_U` is d loss / d divergence, `slope_U` d loss / d the
        student's log-probability of the target."""
        ...


@dataclass(frozen=True)
class TokenLevel:
    """Log-probabilities of the sampled tokens alone."""

    def evaluate(self, logits: LogitRows) -> RowNumbers:
        target_U, shard = logits.target_U, logits.shard
        sums = [sweep(logits.student_UV, target_U, shard)]
        if logits.teacher_UV is not None:
            sums.append(sweep(logits.teacher_UV, target_U, shard))
        gathered = shard.gather(torch.cat(sums)).split(4, dim=1)
        softmaxes = [join(ShardSums.unstack(sums_R4U), shard.scale) for sums_R4U in gathered]
        student, teacher = softmaxes if len(softmaxes) > 1 else (softmaxes[0], None)
        return RowNumbers(student=student, teacher=teacher, divergence_U=None)

    def write_gradient_(self, logits: LogitRows, rows: Any, weight_U: Tensor, slope_U: Tensor) -> None:
        write_gradient_(logits.student_UV, rows.student, logits.target_U, slope_U, slope_U, logits.shard)


@dataclass(frozen=True)
class Examined:
    """An objective that also looks at what of the teacher's probability the student does not reach. There must be a
    teacher."""

    objective: Objective
    floor: float
    """The probability below which the student does not reach a token."""

    def evaluate(self, logits: LogitRows) -> RowNumbers:
        numbers = self.objective.evaluate(logits)
        assert numbers.teacher is not None
        unreached_U = row_unreached(logits, numbers.student, numbers.teacher, self.floor)
        return replace(numbers, unreached_U=unreached_U)

    def write_gradient_(self, logits: LogitRows, rows: Any, weight_U: Tensor, slope_U: Tensor) -> None:
        self.objective.write_gradient_(logits, rows, weight_U, slope_U)


_OBJECTIVES: dict[type, type] = {
    SampledTokens: TokenLevel,
    WholeVocabulary: FullVocabulary,
    LikeliestTokens: TopK,
    ClippedLikeliestTokens: ClippedTopK,
}


def objective_of(comparison: Comparison) -> Objective:
    """Returns the objective that computes what a loss asks of logits; both have the same fields."""
    return _OBJECTIVES[type(comparison)](**vars(comparison))
