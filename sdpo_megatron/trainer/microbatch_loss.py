"""From a micro-batch's final hidden states, and the teacher's, to its share of the loss; at the end of the pipeline."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sdpo_megatron.algorithm.batching import Microbatch
from sdpo_megatron.algorithm.losses.base import LossInputs, Scores, Term
from sdpo_megatron.algorithm.reach import UNREACHED
from sdpo_megatron.algorithm.token_rows import token_rows
from sdpo_megatron.kernels.from_hidden import HiddenPart, logprobs_from_hidden, loss_from_hidden
from sdpo_megatron.kernels.objective import Examined, TokenLevel, objective_of
from sdpo_megatron.kernels.rows import RowNumbers
from sdpo_megatron.trainer.batch import Batch, MiniBatch
from sdpo_megatron.trainer.forward import AtLoss
from sdpo_megatron.trainer.kept_states import KeptStates
from sdpo_megatron.trainer.score import Head


def loss_at_head(
    head: Head,
    terms: Sequence[Term],
    batch: Batch,
    mini_batch: MiniBatch,
    teaching: KeptStates | None,
    step: int,
) -> AtLoss:
    """Returns the function that `forward.run_microbatches` calls with each micro-batch's hidden states."""

    def at_loss(microbatch: Microbatch, hidden_HD: Tensor, head_VD: Tensor) -> tuple[Tensor, dict[str, Any]]:
        tokens = MicrobatchLoss(
            head, terms, batch, mini_batch, teaching, step, microbatch, hidden_HD, head_VD
        )
        loss = tokens.run()
        return loss, {"loss": float(loss.detach())}

    return at_loss


class MicrobatchLoss:
    """The tokens of one micro-batch that are learned from, L of them, and the U rows in which the models are asked.

    Tokens that were sampled alike, in the same context and under the same teacher's, share a row."""

    def __init__(
        self,
        head: Head,
        terms: Sequence[Term],
        batch: Batch,
        mini_batch: MiniBatch,
        teaching: KeptStates | None,
        step: int,
        microbatch: Microbatch,
        hidden_HD: Tensor,
        head_VD: Tensor,
    ):
        self.head, self.terms, self.batch, self.mini_batch = head, terms, batch, mini_batch
        self.head_VD, self.device = head_VD, hidden_HD.device
        place_M = batch.ragged.place_M(microbatch)
        learned_L = (batch.weights_B[place_M] > 0).nonzero()[:, 0]
        teacher_row_L = _rows_of(teaching, place_M[learned_L])
        old_row_L = _rows_of(batch.old_states, place_M[learned_L])
        rows = token_rows(
            *(microbatch.hidden_row_M[learned_L], teacher_row_L.clamp(min=0), old_row_L.clamp(min=0)),
            microbatch.targets_M[learned_L],
        )
        self.rows = rows
        self.place_L = place_M[learned_L[rows.order_T]]
        hidden_row_U, teacher_row_U, old_row_U, target_U = rows.keys_UK.to(self.device).unbind(1)
        self.hidden_UD, self.target_U = hidden_HD[hidden_row_U], target_U
        self.teacher: list[HiddenPart] = []
        if teaching is not None and bool((teacher_row_L >= 0).any()):
            self.teacher = teaching.parts(teacher_row_U)
        self.old = [] if batch.old_states is None else batch.old_states.parts(old_row_U)
        self.inputs = batch.loss_inputs(self.place_L, self.device, step)

    def run(self) -> Tensor:
        """Returns the micro-batch's share of the mini-batch's loss; it is differentiable by hidden states and head."""
        first = self.terms[0].loss
        if self.teacher and first.needs_sequence_advantages:
            self.inputs[0] = self._with_sequence_advantages(self.inputs[0])
        objective = objective_of(first.comparison) if self.teacher else TokenLevel()
        if self.teacher and self.batch.examined:
            objective = Examined(objective, UNREACHED)
        return loss_from_hidden(
            self.hidden_UD,
            self.head_VD,
            self.teacher,
            self.target_U,
            self._loss_of_chunk,
            objective=objective,
            shard=self.head.shard(self.head_VD),
            chunk_tokens=self.head.chunk_tokens,
            old=self.old if self.teacher else (),
        )

    def _loss_of_chunk(
        self, chunk: slice, logprob_U: Tensor, divergence_U: Tensor, numbers: RowNumbers
    ) -> Tensor:
        """Returns the loss of a chunk's rows, T of the tokens: each term's mean over the tokens that it counts, times
        its share."""
        tokens = self.rows.tokens(chunk)
        row_T = (self.rows.row_T[tokens] - chunk.start).to(self.device)
        index_T = torch.arange(tokens.start, tokens.stop, device=self.device)
        inputs = [term_inputs.select(index_T) for term_inputs in self.inputs]
        teacher_mask_T = inputs[0].teacher_mask_T
        student_T = logprob_U[row_T]
        teacher_T = torch.zeros_like(student_T)
        if numbers.teacher is not None:
            teacher_T = numbers.teacher.logprob_U[row_T].where(teacher_mask_T > 0, teacher_T)
        scores = Scores(
            student_logprobs_T=student_T, teacher_logprobs_T=teacher_T, divergences_T=divergence_U[row_T]
        )
        total, seen = self._terms(scores, inputs)
        if (unreached_U := numbers.unreached_U) is not None:
            seen["unreached"] = unreached_U[row_T].where(teacher_mask_T > 0, torch.zeros_like(student_T))
        self.batch.record(
            self.place_L[tokens],
            student=student_T,
            teacher=teacher_T,
            divergence=scores.divergences_T * teacher_mask_T,
            entropy=numbers.student.entropy_U[row_T],
            mass=_mass(numbers, row_T),
            **seen,
        )
        return total

    def _terms(self, scores: Scores, inputs: Sequence[LossInputs]) -> tuple[Tensor, dict[str, Tensor]]:
        """The chunk's loss, and per token what is recorded.

        A recorded loss is what its token adds, times the mini-batch's weight: recorded losses over that weight are the
        loss. Advantages are the first term's, ratios and corrections the last one's, which counts the most tokens."""
        total: Any = 0.0
        seen: dict[str, Any] = {"loss": 0.0, "clipped": 0.0}
        for k, (term, weight) in enumerate(zip(self.terms, self.mini_batch.plan.term_weights, strict=True)):
            loss_T, details = term.loss.token_losses(scores, inputs[k])
            total = total + term.share * loss_T.sum() / max(weight, 1.0)
            scale = term.share * max(self.mini_batch.plan.weight, 1.0) / max(weight, 1.0)
            clipped_T = details.pop("clipped").maximum(torch.as_tensor(seen["clipped"], device=self.device))
            advantage_T = details.pop("advantage") if k == 0 else seen["advantage"]
            seen |= details | {
                "loss": seen["loss"] + scale * loss_T,
                "clipped": clipped_T,
                "advantage": advantage_T,
            }
        return total, seen

    def _with_sequence_advantages(self, inputs: LossInputs) -> LossInputs:
        """Returns the inputs with the mean of teacher - student over each response's taught tokens, spread over its
        tokens."""
        student_U, teacher_U = logprobs_from_hidden(
            *(self.hidden_UD, self.head_VD, self.teacher, self.target_U),
            shard=self.head.shard(self.head_VD),
            chunk_tokens=self.head.chunk_tokens,
        )
        starts = self.batch.ragged.starts
        sample_L = (torch.searchsorted(starts, self.place_L, right=True) - 1).to(self.device)
        weights_L = inputs.weights_T * inputs.teacher_mask_T
        zeros = torch.zeros(len(starts), device=self.device)
        sums = zeros.index_add(
            0, sample_L, weights_L * (teacher_U - student_U)[self.rows.row_T.to(self.device)]
        )
        counts = zeros.index_add(0, sample_L, weights_L)
        return replace(inputs, sequence_advantages_T=(sums / counts.clamp(min=1.0))[sample_L])


def _rows_of(states: KeptStates | None, place_L: Tensor) -> Tensor:
    """Returns where `states` hold what predicts each token; -1 for tokens that they do not hold."""
    return torch.full_like(place_L, -1) if states is None else states.row_B[place_L]


def _mass(numbers: RowNumbers, row_T: Tensor) -> Tensor:
    """Returns the share of the student's probability that the divergence looks at one by one: all of it, but with
    top-K."""
    return torch.ones(len(row_T), device=row_T.device) if numbers.mass_U is None else numbers.mass_U[row_T]
