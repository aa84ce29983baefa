"""Losses from final hidden states: LM head, objective and gradient in chunks of rows, so that no model's logits ever
exist whole.

What is kept between the teacher's pass and the student's are the teacher's final hidden states, D numbers a token in
place of V. The gradients by hidden states and head are made in the forward pass of a chunk, when its logits are there:
a loss must therefore depend on each row alone (a loss that does not, such as the sequence level, takes a first pass
over the rows, `logprobs_from_hidden`). On a GPU the chunk's logits meet the Triton kernels, on a CPU the same maths in
plain torch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sdpo_megatron.algorithm.shapes import expect_shapes
from sdpo_megatron.kernels.objective import Objective, TokenLevel
from sdpo_megatron.kernels.rows import LogitRows, RowNumbers
from sdpo_megatron.kernels.vocab import VocabShard

LossOfChunk = Callable[[slice, Tensor, Tensor, RowNumbers], Tensor]
"""(which rows, the student's logprob_U, divergence_U (zeros without one), all rows' numbers) -> the loss's share, a
scalar, differentiable by the second and the third."""


@dataclass(frozen=True)
class HiddenPart:
    """A model that teaches, alone or mixed with others by adding up logits: q ~ exp(sum of share * logits)."""

    share: float
    hidden_RD: Tensor
    head_VD: Tensor
    """This rank's shard of the LM head, of the same vocabulary as the student's."""
    row_U: Tensor
    """The row of `hidden_RD` that belongs to each of the student's rows."""

    def logits(self, rows: slice) -> Tensor:
        return F.linear(self.hidden_RD[self.row_U[rows]].to(self.head_VD.dtype), self.head_VD)


def loss_from_hidden(
    hidden_UD: Tensor,
    head_VD: Tensor,
    teacher: Sequence[HiddenPart],
    target_U: Tensor,
    loss_of: LossOfChunk,
    *,
    objective: Objective,
    shard: VocabShard,
    chunk_tokens: int,
    old: Sequence[HiddenPart] = (),
) -> Tensor:
    """Returns the sum of `loss_of` over chunks of at most `chunk_tokens` rows; it is differentiable by `hidden_UD` and
    `head_VD`.

    The gradient by `hidden_UD` is this rank's vocabulary shard's part: to be summed over the ranks that share the
    vocabulary, as megatron-core does where hidden states enter the tensor-parallel region. The gradient by `head_VD` is
    summed in float32, and goes into its `main_grad` where megatron's data parallelism has given it one. `old` is the
    policy before this batch's first optimizer step, for an objective that asks for it. Raises a ValueError where shapes
    do not fit each other.
    """
    chunks = _chunks(hidden_UD, head_VD, teacher, old, target_U, objective, shard, chunk_tokens)
    return _LinearLoss.apply(hidden_UD, head_VD, chunks, objective, loss_of)  # type: ignore[return-value]


@torch.no_grad()
def logprobs_from_hidden(
    hidden_UD: Tensor,
    head_VD: Tensor,
    teacher: Sequence[HiddenPart],
    target_U: Tensor,
    *,
    shard: VocabShard,
    chunk_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Returns the log-probabilities of all rows' targets by student and teacher, float32 [U] each, 0 for no teacher;
    nothing is differentiated.

    Raises a ValueError where shapes do not fit each other."""
    student_U, teacher_U = torch.zeros(2, len(target_U), device=hidden_UD.device)
    chunks = _chunks(hidden_UD, head_VD, teacher, (), target_U, TokenLevel(), shard, chunk_tokens)
    for rows, logits, numbers in chunks:
        student_U[rows] = numbers.student.logprob_U
        if numbers.teacher is not None:
            teacher_U[rows] = numbers.teacher.logprob_U
        # before the next chunk's are made
        del logits, numbers
    return student_U, teacher_U


def _mixed_logits(parts: Sequence[HiddenPart], rows: slice) -> Tensor | None:
    """Returns None where there are no parts. The share of a single part is 1."""
    if not parts:
        return None
    if len(parts) == 1:
        return parts[0].logits(rows)
    mixed_UV = parts[0].logits(rows).float().mul_(parts[0].share)
    for part in parts[1:]:
        mixed_UV.add_(part.logits(rows), alpha=part.share)
    return mixed_UV


def _chunks(
    hidden_UD: Tensor,
    head_VD: Tensor,
    teacher: Sequence[HiddenPart],
    old: Sequence[HiddenPart],
    target_U: Tensor,
    objective: Objective,
    shard: VocabShard,
    chunk_tokens: int,
) -> Iterator[tuple[slice, LogitRows, RowNumbers]]:
    """Yields of each chunk which rows it has, their logits and their numbers."""
    expect_shapes(hidden_UD=hidden_UD, head_VD=head_VD, target_U=target_U)
    for part in (*teacher, *old):
        # a teacher may have another hidden size than the student
        expect_shapes(target_U=target_U, row_U=part.row_U)
        expect_shapes(hidden_RD=part.hidden_RD, head_VD=part.head_VD)
    for start in range(0, len(hidden_UD), chunk_tokens):
        rows = slice(start, min(start + chunk_tokens, len(hidden_UD)))
        student_UV = F.linear(hidden_UD[rows].to(head_VD.dtype), head_VD)
        old_UV = _mixed_logits(old, rows)
        teacher_UV = _mixed_logits(teacher, rows)
        logits = LogitRows(student_UV, teacher_UV, target_U[rows], shard, old_UV)
        numbers = objective.evaluate(logits)
        yield rows, logits, numbers
        # before the next chunk's are made
        del student_UV, teacher_UV, old_UV, logits, numbers


def _slopes(loss_of: LossOfChunk, rows: slice, numbers: RowNumbers) -> tuple[Tensor, Tensor, Tensor]:
    """The loss's share, and its derivatives by divergence_U and by the student's logprob_U."""
    with torch.enable_grad():
        logprob_U = numbers.student.logprob_U.detach().requires_grad_()
        divergence_U = numbers.divergence_U
        divergence_U = torch.zeros_like(logprob_U) if divergence_U is None else divergence_U
        divergence_U = divergence_U.detach().requires_grad_()
        loss = loss_of(rows, logprob_U, divergence_U, numbers)
        slope_U, weight_U = torch.autograd.grad(
            loss, (logprob_U, divergence_U), allow_unused=True, materialize_grads=True
        )
    return loss.detach(), weight_U, slope_U


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden_UD: Tensor,
        head_VD: Tensor,
        chunks: Iterator[tuple[slice, LogitRows, RowNumbers]],
        objective: Objective,
        loss_of: LossOfChunk,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden_UD.device)
        hidden_grad_UD = torch.zeros_like(hidden_UD)
        wide = torch.promote_types(head_VD.dtype, torch.float32)
        head_grad_VD = torch.zeros_like(head_VD, dtype=wide)
        for rows, logits, numbers in chunks:
            loss, weight_U, slope_U = _slopes(loss_of, rows, numbers)
            total = total + loss
            objective.write_gradient_(logits, numbers, weight_U, slope_U)
            hidden_grad_UD[rows] = logits.student_UV @ head_VD
            add_product_(head_grad_VD, logits.student_UV, hidden_UD[rows].to(head_VD.dtype))
            # before the next chunk's are made
            del logits, numbers
        ctx.hidden_grad_UD, ctx.head_grad_VD, ctx.head_VD = hidden_grad_UD, head_grad_VD, head_VD
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        hidden_grad_UD = ctx.hidden_grad_UD.mul_(grad)
        head_grad_VD = ctx.head_grad_VD.mul_(grad)
        ctx.hidden_grad_UD = ctx.head_grad_VD = None
        return hidden_grad_UD, _into_main_grad(ctx.head_VD, head_grad_VD), None, None, None


def add_product_(total_VD: Tensor, gradient_UV: Tensor, hidden_UD: Tensor) -> None:
    """Adds gradient^T hidden to the total, summed in the type of `total`, float32 for bfloat16 factors."""
    if gradient_UV.dtype == total_VD.dtype:
        total_VD.addmm_(gradient_UV.T, hidden_UD)
    elif gradient_UV.is_cuda:
        # the product is added where it is made: a sum of its own would move the head three times more
        torch.addmm(total_VD, gradient_UV.T, hidden_UD, out_dtype=total_VD.dtype, out=total_VD)
    else:
        total_VD.addmm_(gradient_UV.T.to(total_VD.dtype), hidden_UD.to(total_VD.dtype))


def _into_main_grad(head_VD: Tensor, gradient_VD: Tensor) -> Tensor:
    """The head's gradient for autograd; where megatron keeps a float32 `main_grad`, it is added there instead.

    Megatron's hook then must not add it once more, and is told so as its own fused layers tell it; a head that is tied
    to the embedding (`zero_out_wgrad`) has another gradient to come, for which what autograd gets must be zeros."""
    main_grad = getattr(head_VD, "main_grad", None)
    if main_grad is None or not hasattr(head_VD, "grad_added_to_main_grad"):
        return gradient_VD.to(head_VD.dtype)
    main_grad.add_(gradient_VD)
    head_VD.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.zeros_like(head_VD)
