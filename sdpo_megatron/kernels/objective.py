"""What a loss asks of the logits of student and teacher, behind two methods: rows' numbers, and the gradient by the
student's logits in place. `from_hidden` calls them chunk by chunk."""

from dataclasses import dataclass
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
from sdpo_megatron.kernels.clipped_top_k import row_clipped_top_k
from sdpo_megatron.kernels.divergence import row_divergence, write_divergence_gradient_
from sdpo_megatron.kernels.rows import LogitRows, RowDivergence, RowSoftmax, ShardSums
from sdpo_megatron.kernels.softmax import join, sweep
from sdpo_megatron.kernels.softmax import write_gradient_ as write_softmax_gradient_
from sdpo_megatron.kernels.top_k import Rest, RowTopK, Support, row_top_k, write_top_k_gradient_
from sdpo_megatron.kernels.unreached import row_unreached


class RowNumbers(Protocol):
    """What an objective finds of each row, [U]; the numbers are equal on all ranks that share the vocabulary."""

    @property
    def student(self) -> RowSoftmax: ...

    @property
    def teacher(self) -> RowSoftmax | None: ...

    @property
    def divergence_U(self) -> Tensor | None: ...


class Objective(Protocol):
    def evaluate(self, logits: LogitRows) -> RowNumbers:
        """Returns the numbers of all rows. The logits are afterwards what they were."""
        ...

    def write_gradient_(self, logits: LogitRows, rows: Any, weight_U: Tensor, slope_U: Tensor) -> None:
        """Overwrites the student's logits by the loss's gradient, and padding columns by 0.

        `rows` is what `rows` gave for these logits; `weight_U` is d loss / d divergence, `slope_U` d loss / d the
        student's log-probability of the target."""
        ...


@dataclass(frozen=True)
class RowLogprobs:
    student: RowSoftmax
    teacher: RowSoftmax | None
    divergence_U: None = None


@dataclass(frozen=True)
class TokenLevel:
    """Log-probabilities of the sampled tokens alone."""

    def evaluate(self, logits: LogitRows) -> RowLogprobs:
        target_U, shard = logits.target_U, logits.shard
        sums = [sweep(logits.student_UV, target_U, shard)]
        if logits.teacher_UV is not None:
            sums.append(sweep(logits.teacher_UV, target_U, shard))
        gathered = shard.gather(torch.cat(sums)).split(4, dim=1)
        softmaxes = [join(ShardSums.unstack(sums_R4U), shard.scale) for sums_R4U in gathered]
        return RowLogprobs(softmaxes[0], softmaxes[1] if len(softmaxes) > 1 else None)

    def write_gradient_(self, logits: LogitRows, rows: Any, weight_U: Tensor, slope_U: Tensor) -> None:
        write_softmax_gradient_(
            logits.student_UV,
            rows.student,
            logits.target_U,
            dense_U=slope_U,
            hot_U=slope_U,
            shard=logits.shard,
        )


@dataclass(frozen=True)
class FullVocabulary:
    """The divergence of the next-token distributions over the whole vocabulary."""

    alpha: float

    def evaluate(self, logits: LogitRows) -> RowDivergence:
        return row_divergence(logits, self.alpha)

    def write_gradient_(self, logits: LogitRows, rows: Any, weight_U: Tensor, slope_U: Tensor) -> None:
        write_divergence_gradient_(logits, rows, weight_U, slope_U, self.alpha)


@dataclass(frozen=True)
class TopK:
    """The divergence over the `k` tokens that the model `support` finds likeliest, and the rest."""

    alpha: float
    k: int
    rest: Rest
    support: Support

    def evaluate(self, logits: LogitRows) -> RowTopK:
        return row_top_k(logits, alpha=self.alpha, k=self.k, rest=self.rest, support=self.support)

    def write_gradient_(self, logits: LogitRows, rows: Any, weight_U: Tensor, slope_U: Tensor) -> None:
        write_top_k_gradient_(logits, rows, weight_U, slope_U)


@dataclass(frozen=True)
class ClippedTopK:
    """PPO's surrogate of reverse KL over the `k` tokens that the policy before this batch found likeliest, and the
    rest as one outcome."""

    k: int
    clip_low: float
    clip_high: float

    def evaluate(self, logits: LogitRows) -> RowTopK:
        return row_clipped_top_k(logits, k=self.k, clip_low=self.clip_low, clip_high=self.clip_high)

    def write_gradient_(self, logits: LogitRows, rows: Any, weight_U: Tensor, slope_U: Tensor) -> None:
        write_top_k_gradient_(logits, rows, weight_U, slope_U)


@dataclass(frozen=True)
class NumbersAndUnreached:
    """What an objective finds of each row, and the share of the teacher's probability on tokens that the student does
    not reach."""

    of_objective: Any
    unreached_U: Tensor

    @property
    def student(self) -> RowSoftmax:
        return self.of_objective.student

    @property
    def teacher(self) -> RowSoftmax:
        return self.of_objective.teacher

    @property
    def divergence_U(self) -> Tensor | None:
        return self.of_objective.divergence_U

    @property
    def mass_U(self) -> Tensor | None:
        return getattr(self.of_objective, "mass_U", None)


@dataclass(frozen=True)
class Examined:
    """An objective that also looks at what of the teacher's probability the student does not reach. There must be a
    teacher."""

    objective: Objective
    floor: float
    """The probability below which the student does not reach a token."""

    def evaluate(self, logits: LogitRows) -> NumbersAndUnreached:
        numbers = self.objective.evaluate(logits)
        assert numbers.teacher is not None
        unreached_U = row_unreached(logits, numbers.student, numbers.teacher, self.floor)
        return NumbersAndUnreached(numbers, unreached_U)

    def write_gradient_(self, logits: LogitRows, rows: Any, weight_U: Tensor, slope_U: Tensor) -> None:
        self.objective.write_gradient_(logits, rows.of_objective, weight_U, slope_U)


_OBJECTIVES: dict[type, type] = {
    SampledTokens: TokenLevel,
    WholeVocabulary: FullVocabulary,
    LikeliestTokens: TopK,
    ClippedLikeliestTokens: ClippedTopK,
}


def objective_of(comparison: Comparison) -> Objective:
    """Returns the objective that computes what a loss asks of logits; both have the same fields."""
    return _OBJECTIVES[type(comparison)](**vars(comparison))
