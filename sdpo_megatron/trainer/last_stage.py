"""The loss at the end of the pipeline: a micro-batch's final hidden states, and the teacher's, to a number."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sdpo_megatron.algorithm.batching import Microbatch
from sdpo_megatron.algorithm.losses import Tokens, token_losses
from sdpo_megatron.config import LossSettings
from sdpo_megatron.kernels.linear_divergence import TeacherPart, linear_loss, linear_rows
from sdpo_megatron.kernels.objective import FullVocabulary, Objective, Rows, TokenLevel, TopK
from sdpo_megatron.trainer.batch import Batch
from sdpo_megatron.trainer.score import Head
from sdpo_megatron.trainer.teacher import Teaching


def objective_of(loss: LossSettings) -> Objective:
    if loss.name == "grpo" or loss.objective != "divergence":
        return TokenLevel()
    if loss.top_k is None:
        return FullVocabulary(loss.alpha)
    return TopK(loss.alpha, loss.top_k, loss.top_k_rest, loss.top_k_support)


@dataclass(frozen=True)
class _RowsOfTokens:
    """Response tokens sorted by row. Tokens that were sampled alike, in the same context and under the same teacher's,
    share a row: its numbers are computed once."""

    student_U: Tensor
    """Row of the micro-batch's hidden states."""
    teacher_U: Tensor
    """Row of the teacher's hidden states; 0 where there is none."""
    target_U: Tensor
    token_T: Tensor
    """Index of the t-th token in the micro-batch."""
    row_T: Tensor
    start_U: list[int]
    """First token of each row; one entry more than rows."""

    def tokens(self, rows: slice) -> slice:
        return slice(self.start_U[rows.start], self.start_U[rows.stop])


def rows_of_tokens(microbatch: Microbatch, token_T: Tensor, teacher_row_T: Tensor) -> _RowsOfTokens:
    """Of the micro-batch's tokens `token_T`; `teacher_row_T` is -1 where a token has no teacher."""
    keys_T3 = torch.stack(
        [microbatch.row_T[token_T], teacher_row_T.clamp(min=0), microbatch.targets_T[token_T]], dim=1
    )
    unique_U3, row_T = torch.unique(keys_T3, dim=0, return_inverse=True)
    order_T = row_T.argsort(stable=True)
    starts = torch.searchsorted(row_T[order_T], torch.arange(len(unique_U3) + 1)).tolist()
    student_U, teacher_U, target_U = unique_U3.unbind(1)
    return _RowsOfTokens(student_U, teacher_U, target_U, token_T[order_T], row_T[order_T], starts)


class LastStage:
    """The loss of one mini-batch's micro-batches, divided by the mini-batch's weight."""

    def __init__(
        self, head: Head, loss: LossSettings, batch: Batch, teaching: Teaching | None, weight: float
    ):
        self.head = head
        self.loss = loss
        self.batch = batch
        self.teaching = teaching
        self.weight = max(weight, 1.0)

    def __call__(
        self, microbatch: Microbatch, hidden_UD: Tensor, head_VD: Tensor
    ) -> tuple[Tensor, dict[str, Any]]:
        index_T = self.batch.ragged.index_T(microbatch)
        token_T = (self.batch.weights_T[index_T] > 0).nonzero()[:, 0]
        teacher_row_T = torch.full_like(token_T, -1)
        if self.teaching is not None:
            teacher_row_T = self.teaching.row_T[index_T[token_T]]
        rows = rows_of_tokens(microbatch, token_T, teacher_row_T)
        device = hidden_UD.device
        hidden_UD = hidden_UD[rows.student_U.to(device)]
        taught = self.teaching is not None and bool((teacher_row_T >= 0).any())
        parts = self.teaching.parts(rows.teacher_U.to(device)) if self.teaching and taught else []
        tokens = self.batch.tokens(index_T[rows.token_T], device)
        call = _Call(self, rows, index_T[rows.token_T], tokens, hidden_UD, head_VD, parts)
        loss = call.run(rows.target_U.to(device))
        return loss, {"loss": float(loss.detach())}


@dataclass
class _Call:
    """One micro-batch on its way through the objective."""

    stage: LastStage
    rows: _RowsOfTokens
    index_T: Tensor
    """Of the tokens in the batch, in the order of their rows."""
    known: Tokens
    hidden_UD: Tensor
    head_VD: Tensor
    parts: Sequence[TeacherPart]

    def run(self, target_U: Tensor) -> Tensor:
        stage = self.stage
        objective = objective_of(stage.loss) if self.parts else TokenLevel()
        shard = stage.head.shard(self.head_VD)
        chunk_tokens = stage.head.chunk_tokens
        if self.parts and stage.loss.objective == "sequence":
            self.known = replace(self.known, sequence_advantage_T=self._sequence_advantages(target_U))
        return linear_loss(
            *(self.hidden_UD, self.head_VD, self.parts, target_U, self._loss),
            objective=objective,
            shard=shard,
            chunk_tokens=chunk_tokens,
        )

    def _loss(self, rows: slice, logprob_U: Tensor, divergence_U: Tensor, numbers: Rows) -> Tensor:
        tokens = self.rows.tokens(rows)
        row_T = (self.rows.row_T[tokens] - rows.start).to(logprob_U.device)
        known = self.known.select(torch.arange(tokens.start, tokens.stop, device=logprob_U.device))
        student_T, divergence_T = logprob_U[row_T], divergence_U[row_T]
        teacher_T = torch.zeros_like(student_T)
        if numbers.teacher is not None:
            teacher_T = numbers.teacher.logprob_U[row_T].where(known.taught_T > 0, teacher_T)
        loss_T, details = token_losses(student_T, teacher_T, divergence_T, known, self.stage.loss)
        self.stage.batch.write_down(
            self.index_T[tokens],
            student=student_T,
            teacher=teacher_T,
            divergence=divergence_T * known.taught_T,
            entropy=numbers.student.entropy_U[row_T],
            mass=_mass(numbers, row_T),
            loss=loss_T,
            **details,
        )
        return loss_T.sum() / self.stage.weight

    def _sequence_advantages(self, target_U: Tensor) -> Tensor:
        """Mean of teacher - student over each response's taught tokens, spread over its tokens."""
        gaps_U = torch.zeros(len(target_U), device=target_U.device)

        def see(rows: slice, numbers: Rows) -> None:
            assert numbers.teacher is not None
            gaps_U[rows] = (numbers.teacher.logprob_U - numbers.student.logprob_U).float()

        linear_rows(
            *(self.hidden_UD, self.head_VD, self.parts, target_U, see),
            objective=TokenLevel(),
            shard=self.stage.head.shard(self.head_VD),
            chunk_tokens=self.stage.head.chunk_tokens,
        )
        starts = self.stage.batch.ragged.starts
        sample_T = (torch.searchsorted(starts, self.index_T, right=True) - 1).to(target_U.device)
        weight_T = self.known.weights_T * self.known.taught_T
        zeros = torch.zeros(len(starts), device=target_U.device)
        sums = zeros.index_add(0, sample_T, weight_T * gaps_U[self.rows.row_T.to(target_U.device)])
        counts = zeros.index_add(0, sample_T, weight_T)
        return (sums / counts.clamp(min=1.0))[sample_T]


def _mass(numbers: Rows, row_T: Tensor) -> Tensor:
    """Of the student's probability, what the divergence looks at one by one: all of it, but with top-K."""
    mass_U = getattr(numbers, "mass_U", None)
    return torch.ones(len(row_T), device=row_T.device) if mass_U is None else mass_U[row_T]
