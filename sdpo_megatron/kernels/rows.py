"""Rows of logits as records: what an objective is asked about, what sweeps over shards sum up, and a row's softmax.

A row is a distinct (hidden state, token) pair, axis U; its columns are this rank's shard of the vocabulary, axis V.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sdpo_megatron.algorithm.shapes import expect_shapes
from sdpo_megatron.kernels.vocab import VocabShard


@dataclass(frozen=True)
class LogitRows:
    """Both models' logits of the same rows, and the token of each row.

    Raises a ValueError where the shapes do not fit each other.
    """

    student_UV: Tensor
    """This rank's shard of the student's logits; bfloat16, float32 or float64, columns contiguous. The gradient is
    written over it."""
    teacher_UV: Tensor | None
    """The teacher's logits; None without a teacher, which only `TokenLevel` does without. They may be of another type
    than the student's."""
    target_U: Tensor
    """Token ids of the whole vocabulary, int64: the log-probabilities are these tokens'."""
    shard: VocabShard
    old_UV: Tensor | None = None
    """The policy's logits before this batch's first optimizer step, for the objective that asks for them; None stands
    for the student's."""

    def __post_init__(self) -> None:
        expect_shapes(
            student_UV=self.student_UV,
            teacher_UV=self.teacher_UV,
            target_U=self.target_U,
            old_UV=self.old_UV,
        )

    @property
    def both(self) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's logits; raises a ValueError where there is no teacher."""
        if self.teacher_UV is None:
            raise ValueError("teacher_UV is None; a divergence needs a teacher's logits")
        return self.student_UV, self.teacher_UV

    @property
    def columns(self) -> int:
        """How many columns this rank's shard has, padding included."""
        return self.student_UV.shape[1]

    @property
    def valid(self) -> int:
        """How many of the columns are no padding."""
        return self.shard.valid(self.columns)


class ShardSums(NamedTuple):
    """What a sweep over one model's logits says of each row of each of R shards; float32, or float64 for such logits.

    The sums are relative to the shard's own maximum. A sweep gives its own shard's stacked, [4, U], in this order: one
    all-gather carries them.
    """

    max_RU: Tensor
    """The largest logit, not divided by the temperature; NEGATIVE in a shard of padding alone."""
    exp_sum_RU: Tensor
    """Sum of exp((logit - max) / temperature)."""
    target_RU: Tensor
    """The target's logit, 0 where it is another shard's."""
    entropy_sum_RU: Tensor
    """Sum of exp(x) x, x = (logit - max) / temperature."""

    @classmethod
    def unstack(cls, sums_R4U: Tensor) -> "ShardSums":
        return cls(*sums_R4U.unbind(1))

    def stack(self) -> Tensor:
        """Returns the sums as one tensor, [R, 4, U]."""
        return torch.stack(self, dim=1)


class JointSums(NamedTuple):
    """What a sweep over both models' logits says of each row of each of R shards; stacked, [R, 9, U]."""

    student: ShardSums
    teacher: ShardSums
    kl_sum_RU: Tensor
    """Sum of exp(a) (a - b), relative to the shard's own maxima; a is the student's x and b the teacher's, or with
    forward KL the other way round."""

    @classmethod
    def unstack(cls, sums_R9U: Tensor) -> "JointSums":
        student_R4U, teacher_R4U, kl_R1U = sums_R9U.split((4, 4, 1), dim=1)
        return cls(ShardSums.unstack(student_R4U), ShardSums.unstack(teacher_R4U), kl_R1U[:, 0])


@dataclass(frozen=True)
class RowSoftmax:
    """The softmax of each row over the whole vocabulary, at the temperature; float32, or float64 for such logits."""

    max_U: Tensor
    """The largest logit, not divided by the temperature."""
    log_sum_U: Tensor
    """The logarithm of the sum of exp((logit - max) / temperature)."""
    logprob_U: Tensor
    """The log-probability of the row's target."""
    entropy_U: Tensor
    """The entropy, in nats."""


@dataclass(frozen=True, kw_only=True)
class RowNumbers:
    """What an objective finds of each row; equal on all ranks that share the vocabulary."""

    student: RowSoftmax
    teacher: RowSoftmax | None
    divergence_U: Tensor | None
    """The divergence, in nats; None where sampled tokens alone are compared."""
    mass_U: Tensor | None = None
    """The student's probability of the tokens that the divergence looks at one by one; None: of all."""
    unreached_U: Tensor | None = None
    """The teacher's probability of tokens that the student does not reach; None where nobody asked."""


@dataclass(frozen=True, kw_only=True)
class RowDivergence(RowNumbers):
    """The divergence of each row over the whole vocabulary, and what its gradient needs."""

    teacher: RowSoftmax
    divergence_U: Tensor
    offset_U: Tensor
    """What the gradient subtracts from log(p/q) or log(p/m): KL(p || q), or KL(p || m); unused at alpha = 0."""
