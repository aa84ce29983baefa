"""One step's samples as the trainer works on them: what is known per token, which rank computes what, what came out."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdpo_megatron.algorithm.batching import Microbatch, split_mini_batches, student_views
from sdpo_megatron.algorithm.losses.base import LossInputs, Term, is_taught
from sdpo_megatron.records import Sample
from sdpo_megatron.trainer.kept_states import KeptStates
from sdpo_megatron.trainer.parallel import ParallelState
from sdpo_megatron.trainer.score import Packer, Ragged

SEEN: tuple[str, ...] = (
    "computed", "student", "teacher", "advantage", "divergence", "entropy", "mass", "loss", "ratio", "clipped",
    "correction",
)  # fmt: skip
"""What is recorded of each token that is learned from."""


@dataclass(frozen=True)
class MiniBatch:
    """What one optimizer step learns from."""

    samples: list[Sample]
    """The samples with a gradient, on any rank: the others are not computed, though their tokens count as divisor."""
    microbatches: list[Microbatch]
    """The student's micro-batches that this data-parallel rank computes."""
    weight: float
    """Sum of the weights of all the mini-batch's tokens, on all ranks."""
    term_weights: list[float]
    """The same for each term of the loss, over the tokens that it counts: what the term is divided by."""

    @property
    def own_samples(self) -> list[Sample]:
        """The samples that this data-parallel rank computes."""
        own = {sample_id for microbatch in self.microbatches for sample_id in microbatch.sample_ids}
        return [sample for sample in self.samples if sample.id in own]


class Batch:
    """The samples of one step. Every rank makes the same batch of the same samples; flat tensors [B] are on the CPU, in
    `ragged`'s order."""

    def __init__(
        self,
        samples: Sequence[Sample],
        packer: Packer,
        *,
        terms: Sequence[Term],
        group_size: int,
        mini_batches: int,
    ):
        self.samples = list(samples)
        self.ragged = Ragged([len(sample.response_ids_T) for sample in samples])
        self.teacher_mask_B = self.ragged.firsts([s.teacher_tokens if is_taught(s) else 0 for s in samples])
        mask_B = self.ragged.flatten([sample.loss_mask_T for sample in samples])
        self._losses = [term.loss for term in terms]
        self.term_weights_B = [loss.weights(mask_B, self.teacher_mask_B) for loss in self._losses]
        self.weights_B = torch.stack(self.term_weights_B).amax(0)
        """Each token's weight in the term that counts it most."""
        self.rollout_logprobs_B = self.ragged.flatten([sample.rollout_logprobs_T for sample in samples])
        self.group_advantages_B = self.ragged.spread([sample.group_advantage for sample in samples])
        self.old_logprobs_B: Tensor | None = None
        """The policy's log-probabilities before the first of several optimizer steps."""
        self.old_states: KeptStates | None = None
        """The policy's final hidden states at that point, for a loss that needs whole distributions."""
        self.seen: dict[str, Tensor] = {name: self.ragged.zeros() for name in SEEN}
        self.mini_batches = [
            self._mini_batch(part, packer) for part in split_mini_batches(samples, group_size, mini_batches)
        ]

    def loss_inputs(self, place_T: Tensor, device: torch.device, step: int) -> list[LossInputs]:
        """Returns what each term of the loss is told of the tokens at these places of the batch."""

        def at(flat_B: Tensor) -> Tensor:
            return flat_B[place_T].to(device)

        return [
            LossInputs(
                weights_T=at(weights_B),
                teacher_mask_T=at(self.teacher_mask_B),
                rollout_logprobs_T=at(self.rollout_logprobs_B),
                old_logprobs_T=None if self.old_logprobs_B is None else at(self.old_logprobs_B),
                group_advantages_T=at(self.group_advantages_B),
                step=step,
            )
            for weights_B in self.term_weights_B
        ]

    def record(self, place_T: Tensor, **values_T: Tensor) -> None:
        """Records what the loss saw of the tokens at these places; `join` joins the ranks' parts."""
        self.seen["computed"][place_T] = 1.0
        # one transfer
        on_cpu = torch.stack([value_T.detach().float() for value_T in values_T.values()]).cpu()
        for name, value_T in zip(values_T, on_cpu, strict=True):
            self.seen[name][place_T] = value_T

    def join(self, parallel: ParallelState) -> None:
        """Brings everything that was recorded to every rank. What tensor-parallel ranks all know counts once."""
        self.seen = self.joined(SEEN, parallel)

    def joined(self, names: Sequence[str], parallel: ParallelState) -> dict[str, Tensor]:
        """Returns what was recorded so far under these names, on any rank; every rank calls it."""
        stacked = torch.stack([self.seen[name] for name in names])
        if not parallel.owns_tokens:
            stacked.zero_()
        return dict(zip(names, parallel.total(stacked), strict=True))

    @property
    def old(self) -> Tensor:
        """The policy's log-probabilities before the batch's first optimizer step, [B]; after `join`."""
        return self.seen["student"] if self.old_logprobs_B is None else self.old_logprobs_B

    def by_sample(self, flat_B: Tensor) -> list[list[float | None] | None]:
        """Returns the numbers by sample, with None for tokens and samples that were not computed, because nothing could
        be learned from them."""
        rows = []
        for values, computed in zip(
            self.ragged.split(flat_B), self.ragged.split(self.seen["computed"]), strict=True
        ):
            row = [value if known else None for value, known in zip(values, computed, strict=True)]
            rows.append(row if any(computed) else None)
        return rows

    def _mini_batch(self, part: Sequence[Sample], packer: Packer) -> MiniBatch:
        weight_of = self._weights_by_sample(self.weights_B, part)
        learns = [s for s in part if weight_of[s.id] > 0 and any(loss.has_signal(s) for loss in self._losses)]
        term_weights = [sum(self._weights_by_sample(w_B, part).values()) for w_B in self.term_weights_B]
        return MiniBatch(learns, packer(student_views(learns)), sum(weight_of.values()), term_weights)

    def _weights_by_sample(self, weights_B: Tensor, part: Sequence[Sample]) -> dict[int, float]:
        starts = self.ragged.starts.tolist()
        return {s.id: float(weights_B[starts[s.id] : starts[s.id + 1]].sum()) for s in part}
