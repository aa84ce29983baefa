"""What a loss asks of the logits of student and teacher, behind two methods: rows' numbers, and the gradient by the
student's logits in place. `linear_divergence` calls them chunk by chunk."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sdpo_megatron.algorithm.losses.base import (
    Comparison,
    LikeliestTokens,
    SampledTokens,
    WholeVocabulary,
)
from sdpo_megatron.kernels.divergence import RowDivergence, row_divergence, write_divergence_gradient_
from sdpo_megatron.kernels.softmax import join, sweep, write_gradient_
from sdpo_megatron.kernels.top_k import Rest, RowTopK, Support, row_top_k, write_top_k_gradient_
from sdpo_megatron.kernels.vocab import RowSoftmax, VocabShard


class Rows(Protocol):
    """[U]-sized numbers, equal on all ranks that share the vocabulary."""

    @property
    def student(self) -> RowSoftmax: ...

    @property
    def teacher(self) -> RowSoftmax | None: ...

    @property
    def divergence_U(self) -> Tensor | None: ...


class Objective(Protocol):
    def rows(self, student_UV: Tensor, teacher_UV: Any, target_U: Tensor, shard: VocabShard) -> Rows:
        """`teacher_UV` is a tensor, or None without a teacher, which only `TokenLevel` does without; the
        log-probabilities are of `target_U`. All logits are afterwards what they were."""
        ...

    def write_gradient_(
        self,
        student_UV: Tensor,
        teacher_UV: Any,
        rows: Any,
        target_U: Tensor,
        weight_U: Tensor,
        slope_U: Tensor,
        shard: VocabShard,
    ) -> None:
        """`weight_U` is d loss / d divergence, `slope_U` d loss / d the student's log-probability."""
        ...


@dataclass(frozen=True)
class RowLogprobs:
    student: RowSoftmax
    teacher: RowSoftmax | None
    divergence_U: None = None


@dataclass(frozen=True)
class TokenLevel:
    """Log-probabilities of the sampled tokens alone."""

    def rows(
        self, student_UV: Tensor, teacher_UV: Tensor | None, target_U: Tensor, shard: VocabShard
    ) -> RowLogprobs:
        models = [student_UV] if teacher_UV is None else [student_UV, teacher_UV]
        parts = shard.gather(torch.cat([sweep(logits, target_U, shard) for logits in models]))
        softmaxes = [join(parts[:, 4 * k : 4 * k + 4], shard.scale) for k in range(len(models))]
        return RowLogprobs(softmaxes[0], softmaxes[1] if len(models) > 1 else None)

    def write_gradient_(self, student_UV, teacher_UV, rows, target_U, weight_U, slope_U, shard) -> None:
        write_gradient_(student_UV, rows.student, target_U, slope_U, slope_U, shard)


@dataclass(frozen=True)
class FullVocabulary:
    alpha: float

    def rows(
        self, student_UV: Tensor, teacher_UV: Tensor, target_U: Tensor, shard: VocabShard
    ) -> RowDivergence:
        return row_divergence(student_UV, teacher_UV, target_U, alpha=self.alpha, shard=shard)

    def write_gradient_(self, student_UV, teacher_UV, rows, target_U, weight_U, slope_U, shard) -> None:
        write_divergence_gradient_(
            student_UV, teacher_UV, rows, target_U, weight_U, slope_U, alpha=self.alpha, shard=shard
        )


@dataclass(frozen=True)
class TopK:
    alpha: float
    k: int
    rest: Rest
    support: Support

    def rows(self, student_UV: Tensor, teacher_UV: Tensor, target_U: Tensor, shard: VocabShard) -> RowTopK:
        return row_top_k(
            *(student_UV, teacher_UV, target_U),
            alpha=self.alpha,
            k=self.k,
            rest=self.rest,
            support=self.support,
            shard=shard,
        )

    def write_gradient_(self, student_UV, teacher_UV, rows, target_U, weight_U, slope_U, shard) -> None:
        write_top_k_gradient_(student_UV, rows, target_U, weight_U, slope_U, shard)


_OBJECTIVES: dict[type, type] = {
    SampledTokens: TokenLevel,
    WholeVocabulary: FullVocabulary,
    LikeliestTokens: TopK,
}


def objective_of(comparison: Comparison) -> Objective:
    """The kernels' side of what a loss asks of logits; both have the same fields."""
    return _OBJECTIVES[type(comparison)](**vars(comparison))
