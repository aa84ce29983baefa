"""One step's samples as a rank works on them: what is known per token, what it computes, what came out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sdpo_megatron.algorithm.batching import Microbatch, student_views
from sdpo_megatron.algorithm.learning_metrics import OwnTokens, WholeStep, learning_metrics
from sdpo_megatron.algorithm.losses.base import Loss, LossInputs
from sdpo_megatron.records import Sample
from sdpo_megatron.trainer.kept_states import KeptStates
from sdpo_megatron.trainer.parallel import ParallelState
from sdpo_megatron.trainer.plan import MiniBatchPlan, Part, token_weights
from sdpo_megatron.trainer.ragged import Ragged
from sdpo_megatron.trainer.score import Packer

SEEN: tuple[str, ...] = (
    "computed", "student", "teacher", "advantage", "divergence", "entropy", "mass", "loss", "ratio", "clipped",
    "correction", "unreached",
)  # fmt: skip
"""What is recorded of each token that is learned from; `unreached` where the teacher is examined."""


@dataclass(frozen=True)
class MiniBatch:
    """What one optimizer step learns from."""

    plan: MiniBatchPlan
    """What rank 0 has made out for it, by the samples' ids."""
    own_samples: list[Sample]
    """The samples that this data-parallel rank computes."""
    microbatches: list[Microbatch]
    """The student's micro-batches of them."""


class Batch:
    """A data-parallel rank's part of a step. Its ranks make the same of it; flat tensors [B] are on the CPU, in
    `ragged`'s order, and have its own tokens only."""

    def __init__(
        self,
        part: Part,
        packer: Packer,
        losses: Sequence[Loss],
        step_samples: Sequence[Sample] = (),
        step_parts: Sequence[Part] = (),
    ):
        """Rank 0 alone knows the whole step's samples, and by data-parallel rank who computes which."""
        self.samples = part.samples
        self.ragged = Ragged([len(s.response_ids_T) for s in self.samples], [s.id for s in self.samples])
        self.teacher_mask_B, self.term_weights_B = token_weights(self.samples, self.ragged, losses)
        self.weights_B = torch.stack(self.term_weights_B).amax(0)
        """Each token's weight in the term that counts it most."""
        self.rollout_logprobs_B = self.ragged.flatten([sample.rollout_logprobs_T for sample in self.samples])
        self.group_advantages_B = self.ragged.spread([sample.group_advantage for sample in self.samples])
        self.old_logprobs_B: Tensor | None = None
        """The policy's log-probabilities before the first of several optimizer steps; on the last stage."""
        self.examined = False
        """Whether the teacher is examined by what is recorded."""
        self.old_states: KeptStates | None = None
        """The policy's final hidden states at that point, for a loss that needs whole distributions."""
        self.seen: dict[str, Tensor] = {name: self.ragged.zeros() for name in SEEN}
        """What was recorded, on the last stage."""
        self.mini_batches = []
        for plan in part.mini_batches:
            ids = {sample_id for microbatch in plan.microbatches for sample_id in microbatch}
            own = [sample for sample in self.samples if sample.id in ids]
            made = packer.made(student_views(own), plan.microbatches)
            self.mini_batches.append(MiniBatch(plan, own, made))
        self.whole = WholeStep(
            weight=sum(plan.weight for plan in part.mini_batches), tokens=part.tokens, groups=part.groups
        )
        self.step_samples, self.step_parts = step_samples, step_parts
        """Of the whole step; empty but on rank 0."""

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
        """Records what the loss saw of the tokens at these places."""
        self.seen["computed"][place_T] = 1.0
        # one transfer
        on_cpu = torch.stack([value_T.detach().float() for value_T in values_T.values()]).cpu()
        for name, value_T in zip(values_T, on_cpu, strict=True):
            self.seen[name][place_T] = value_T

    @property
    def old(self) -> Tensor:
        """The policy's log-probabilities before the batch's first optimizer step, [B]; on the last stage."""
        return self.seen["student"] if self.old_logprobs_B is None else self.old_logprobs_B

    def metrics(self, loss: Loss, group_size: int, parallel: ParallelState) -> dict[str, float]:
        """Returns what the step has to report about learning, on every rank; every rank calls it."""
        own = OwnTokens(
            samples=self.samples,
            seen=self.seen,
            weights_B=self.weights_B,
            teacher_mask_B=self.teacher_mask_B,
            rollout_logprobs_B=self.rollout_logprobs_B,
            old_logprobs_B=self.old,
        )
        return learning_metrics(own, self.whole, loss=loss, group_size=group_size, everyone=parallel)

    def gathered(
        self, names: Sequence[str], parallel: ParallelState, samples: int | None = None
    ) -> dict[str, np.ndarray]:
        """Brings what was recorded under these names to rank 0, of the step's first `samples` samples, or all. `old`
        is a name too.

        Returns, by name, the numbers of these samples' tokens, one after another, float32, 0 where nobody computed
        the token. Empty on other ranks. Every rank calls it."""
        own = [s for s in self.samples if samples is None or s.id < samples]
        end = int(self.ragged.starts[len(own)])
        columns = [(self.old if name == "old" else self.seen[name])[:end] for name in names]
        wanted = self.step_samples[:samples]
        ragged = Ragged([len(s.response_ids_T) for s in wanted], [s.id for s in wanted])
        ids = [{s.id for s in part.samples} for part in self.step_parts]
        places = [ragged.where([s.id in of_rank for s in wanted]) for of_rank in ids]
        received = parallel.gather_tokens(
            torch.stack(columns).flatten(), [len(names) * len(place_T) for place_T in places]
        )
        if not parallel.is_main:
            return {}
        found = torch.zeros(len(names), int(ragged.starts[-1]))
        for place_T, values in zip(places, received, strict=True):
            found[:, place_T] = values.view(len(names), -1)
        return dict(zip(names, found.numpy(), strict=True))
