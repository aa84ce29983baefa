"""One step's samples as the trainer works on them: what is known per token, which rank computes what, what came out."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdpo_megatron.algorithm.batching import Microbatch, split_mini_batches, student_views
from sdpo_megatron.algorithm.losses import Tokens
from sdpo_megatron.config import LossSettings
from sdpo_megatron.records import Sample
from sdpo_megatron.trainer.parallel import ParallelState
from sdpo_megatron.trainer.score import Packer, Ragged

SEEN: tuple[str, ...] = (
    "computed", "student", "teacher", "advantage", "divergence", "entropy", "mass", "loss", "ratio", "clipped",
    "correction",
)  # fmt: skip
"""What the last stage writes down of each token that it learned from."""


@dataclass(frozen=True)
class MiniBatch:
    """What one optimizer step learns from."""

    samples: list[Sample]
    """Those with a gradient, on any rank: the others are not computed, though their tokens count as divisor."""
    microbatches: list[Microbatch]
    """This data-parallel rank's, of the student."""
    weight: float
    """Sum of the weights of all its tokens, on all ranks: the loss is divided by it."""

    @property
    def own_samples(self) -> list[Sample]:
        """Those that this data-parallel rank computes."""
        own = {sample_id for microbatch in self.microbatches for sample_id in microbatch.sample_ids}
        return [sample for sample in self.samples if sample.id in own]


class Batch:
    """Every rank makes the same one of the same samples; flat tensors are on the CPU, in `ragged`'s order."""

    def __init__(
        self,
        samples: Sequence[Sample],
        packer: Packer,
        *,
        loss: LossSettings,
        group_size: int,
        mini_batches: int,
    ):
        self.samples = list(samples)
        self.ragged = Ragged([len(sample.response_ids_T) for sample in samples])
        self.taught_T = self.ragged.flatten([_taught(sample) for sample in samples])
        mask_T = self.ragged.flatten([sample.loss_mask_T for sample in samples])
        needs_teacher = loss.name == "sdpo" and loss.group_advantage_weight == 0
        self.weights_T = mask_T * self.taught_T if needs_teacher else mask_T
        self.rollout_T = self.ragged.flatten([sample.rollout_logprobs_T for sample in samples])
        self.group_advantage_T = self.ragged.spread([sample.group_advantage for sample in samples])
        self.old_T: Tensor | None = None
        """The policy's log-probabilities before the first of several optimizer steps."""
        self.seen: dict[str, Tensor] = {name: self.ragged.zeros() for name in SEEN}
        self._loss = loss
        self.mini_batches = [
            self._mini_batch(part, packer) for part in split_mini_batches(samples, group_size, mini_batches)
        ]

    def tokens(self, index_T: Tensor, device: torch.device) -> Tokens:
        def at(flat: Tensor) -> Tensor:
            return flat[index_T].to(device)

        return Tokens(
            weights_T=at(self.weights_T),
            taught_T=at(self.taught_T),
            rollout_T=at(self.rollout_T),
            old_T=None if self.old_T is None else at(self.old_T),
            group_advantage_T=at(self.group_advantage_T),
        )

    def write_down(self, index_T: Tensor, **values_T: Tensor) -> None:
        """What the last stage saw; the ranks' parts are joined by `join`."""
        self.seen["computed"][index_T] = 1.0
        on_cpu = torch.stack(
            [value_T.detach().float() for value_T in values_T.values()]
        ).cpu()  # one transfer
        for name, value_T in zip(values_T, on_cpu, strict=True):
            self.seen[name][index_T] = value_T

    def join(self, parallel: ParallelState) -> None:
        """Everything seen, on every rank. What tensor-parallel ranks all know counts once."""
        stacked = torch.stack([self.seen[name] for name in SEEN])
        if parallel.tp_rank != 0:
            stacked.zero_()
        self.seen = dict(zip(SEEN, parallel.total(stacked), strict=True))

    @property
    def old(self) -> Tensor:
        """The policy's log-probabilities before the batch's first optimizer step; after `join`."""
        return self.seen["student"] if self.old_T is None else self.old_T

    def rows(self, flat_T: Tensor) -> list[list[float | None] | None]:
        """By sample; None for what was not computed, because nothing could be learned from it: tokens, and samples."""
        rows = []
        for values, computed in zip(
            self.ragged.split(flat_T), self.ragged.split(self.seen["computed"]), strict=True
        ):
            row = [value if known else None for value, known in zip(values, computed, strict=True)]
            rows.append(row if any(computed) else None)
        return rows

    def _mini_batch(self, part: Sequence[Sample], packer: Packer) -> MiniBatch:
        starts = self.ragged.starts.tolist()
        weight_of = {s.id: float(self.weights_T[starts[s.id] : starts[s.id + 1]].sum()) for s in part}
        learns = [s for s in part if weight_of[s.id] > 0 and self._has_signal(s)]
        return MiniBatch(learns, packer(student_views(learns)), sum(weight_of.values()))

    def _has_signal(self, sample: Sample) -> bool:
        taught = self._loss.name == "sdpo" and any(_taught(sample))
        return (
            taught or sample.group_advantage != 0
        )  # where rewards do not count, only what is taught has weight


def _taught(sample: Sample) -> list[float]:
    taught = sample.teacher_tokens if sample.teacher_prompt_ids is not None else 0
    return [float(t < taught) for t in range(len(sample.response_ids_T))]
