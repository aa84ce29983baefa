"""Which data-parallel rank computes which samples of a step: decided on rank 0, which knows all of them."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from sdpo_megatron.algorithm.batching import View, split_mini_batches, student_views
from sdpo_megatron.algorithm.losses.base import Loss, is_taught
from sdpo_megatron.records import Sample
from sdpo_megatron.trainer.ragged import Ragged
from sdpo_megatron.trainer.sample_buffer import decode, encode


def token_weights(
    samples: Sequence[Sample], ragged: Ragged, losses: Sequence[Loss]
) -> tuple[Tensor, list[Tensor]]:
    """Returns of each of the samples' tokens, [B], whether the teacher can say something of it, 1 or 0, and how often
    it counts in each term of the loss."""
    teacher_mask_B = ragged.firsts([s.teacher_tokens if is_taught(s) else 0 for s in samples])
    mask_B = ragged.flatten([sample.loss_mask_T for sample in samples])
    return teacher_mask_B, [loss.weights(mask_B, teacher_mask_B) for loss in losses]


Pack = Callable[[Sequence[View]], list[list[list[int]]]]
"""Views -> for each data-parallel rank, the sample ids of each of its micro-batches."""


@dataclass(frozen=True)
class MiniBatchPlan:
    """What one data-parallel rank knows of the samples behind one optimizer step."""

    weight: float
    """Sum of the weights of all the mini-batch's tokens, on all ranks."""
    term_weights: list[float]
    """The same for each term of the loss, over the tokens that it counts: what the term is divided by."""
    has_signal: bool
    """Whether any rank has a sample with a gradient."""
    microbatches: list[list[int]]
    """The sample ids of each micro-batch that this rank computes."""


@dataclass(frozen=True)
class Part:
    """What one data-parallel rank gets of a step."""

    samples: list[Sample]
    """Those that it computes, by id."""
    mini_batches: list[MiniBatchPlan]
    tokens: int
    """Response tokens of the whole step."""
    groups: int
    """Groups of the whole step."""

    def encoded(self) -> np.ndarray:
        """Returns the part as bytes, uint8 [bytes]."""
        plans = [asdict(mini_batch) for mini_batch in self.mini_batches]
        return encode(self.samples, {"plans": plans, "tokens": self.tokens, "groups": self.groups})

    @staticmethod
    def decoded(buffer: np.ndarray) -> "Part":
        samples, about = decode(buffer)
        return Part(
            samples,
            [MiniBatchPlan(**plan) for plan in about["plans"]],
            tokens=about["tokens"],
            groups=about["groups"],
        )


def plan(
    samples: Sequence[Sample],
    losses: Sequence[Loss],
    pack: Pack,
    *,
    dp: int,
    group_size: int,
    mini_batches: int,
) -> list[Part]:
    """Returns the part of each of the dp ranks. Samples without a gradient are nobody's, though their tokens count as
    divisor."""
    ragged = Ragged([len(sample.response_ids_T) for sample in samples])
    _, of_terms_B = token_weights(samples, ragged, losses)
    most_B = torch.stack(of_terms_B).amax(0)
    weight_S, *term_weights_S = (_sums(weights_B, ragged) for weights_B in (most_B, *of_terms_B))
    plans: list[list[MiniBatchPlan]] = [[] for _ in range(dp)]
    own: list[list[Sample]] = [[] for _ in range(dp)]
    place_of = {sample.id: place for place, sample in enumerate(samples)}
    for part in split_mini_batches(samples, group_size, mini_batches):
        places = [place_of[sample.id] for sample in part]
        learns = [
            sample
            for place, sample in zip(places, part, strict=True)
            if weight_S[place] > 0 and any(loss.has_signal(sample) for loss in losses)
        ]
        weight, *term_weights = (float(sums_S[places].sum()) for sums_S in (weight_S, *term_weights_S))
        for rank, microbatches in enumerate(pack(student_views(learns))):
            plans[rank].append(MiniBatchPlan(weight, term_weights, bool(learns), microbatches))
            of_rank = {sample_id for microbatch in microbatches for sample_id in microbatch}
            own[rank] += [sample for sample in learns if sample.id in of_rank]
    tokens, groups = int(ragged.starts[-1]), len({sample.id // group_size for sample in samples})
    return [Part(own[rank], plans[rank], tokens, groups) for rank in range(dp)]


def _sums(weights_B: Tensor, ragged: Ragged) -> Tensor:
    """Returns the sum over each sample's tokens."""
    up_to = torch.cat([torch.zeros(1, dtype=torch.float64), weights_B.double().cumsum(0)])
    return up_to[ragged.starts[1:]] - up_to[ragged.starts[:-1]]
