"""Who teaches: the same model under the teacher's prompt, with one of four sets of weights (arXiv 2601.20802, appendix
A.2, table 4).

    frozen         q = pi_ref, the initial weights (or those of another model, `teacher.path`)
    ema            q = pi_avg,   avg <- (1 - rate) avg + rate theta; the paper's 0.05 (section 3) or 0.01 (4, 5)
    trust_region   q ~ exp((1 - a) log pi_ref + a log pi_theta), both under the teacher's prompt; the paper's a = 0.01
    live           q = pi_theta as it is now: no regularisation, which the paper finds to diverge

A teacher's pass leaves final hidden states on the last pipeline stage, from which the loss makes logits chunk by chunk.
Each mini-batch has a pass of its own, right before it is learned from: where the teacher follows the policy, it does so
with the weights of that moment. `teacher.keep_hidden` says where the states wait.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch
from torch import nn

from sdpo_megatron.algorithm.batching import teacher_views
from sdpo_megatron.config import TeacherSettings
from sdpo_megatron.records import Sample
from sdpo_megatron.trainer.kept_states import KeptStates, Place, Teaching, Weights, keep_states
from sdpo_megatron.trainer.parallel import ParallelState
from sdpo_megatron.trainer.ragged import Ragged
from sdpo_megatron.trainer.score import Packer
from sdpo_megatron.trainer.weight_average import WeightAverage

Cadence = Literal["batch", "optimizer_step"]


class VisitingWeights:
    """Weights that may live in host memory and come to the device for a pass; they are never changed there."""

    def __init__(self, chunks: list[nn.Module], device: torch.device, offload: bool):
        self.chunks = chunks
        self._device = device
        self._offload = offload
        if offload:
            for tensor in self._tensors():
                tensor.data = tensor.data.cpu()

    @contextmanager
    def on_device(self) -> Iterator[list[nn.Module]]:
        """Within this context the chunks are on the device."""
        if not self._offload:
            yield self.chunks
            return
        homes = [tensor.data for tensor in self._tensors()]
        for tensor in self._tensors():
            tensor.data = tensor.data.to(self._device, non_blocking=True, copy=True)
        try:
            yield self.chunks
        finally:
            for tensor, home in zip(self._tensors(), homes, strict=True):
                tensor.data = home

    def _tensors(self) -> list[nn.Parameter]:
        return [parameter for chunk in self.chunks for parameter in chunk.parameters()]


@dataclass(eq=False)
class Teacher:
    """The weights that teach, and their passes. All ranks construct it and call its methods together."""

    settings: TeacherSettings
    _: KW_ONLY
    own: VisitingWeights | None
    """Weights that only teach; None for `live`."""
    policy: list[nn.Module]
    average: WeightAverage | None
    """What they follow, for `ema`."""
    packer: Packer
    parallel: ParallelState

    def teach(self, samples: Sequence[Sample], ragged: Ragged) -> Teaching:
        """Passes `samples`, those with a loss that this data-parallel rank computes, through the teacher, in
        micro-batches of their own lengths; or returns what will do that for some of them at a time."""
        keep = self.settings.keep_hidden
        place: Place | None = "device" if keep == "recompute" else keep

        def passed(some: Sequence[Sample]) -> KeptStates:
            microbatches = self.packer.alone(teacher_views(some))
            return keep_states(self._mixture(), microbatches, ragged, self.parallel, place=place)

        return passed if keep == "recompute" else passed(samples)

    def update_after(self, after: Cadence) -> None:
        """Updates the average, and the teacher with it, where `after` is its cadence. Must be called after every
        optimizer step and after every batch."""
        if self.average is not None and self.settings.ema_every == after:
            self.average.update(self.settings.ema_rate)
            self.show_average()

    def show_average(self) -> None:
        """Brings the teacher's weights up to the average, for example after it was loaded."""
        if self.average is not None and self.own is not None:
            self.average.copy_to(self.own.chunks)

    def _mixture(self) -> list[tuple[float, Weights]]:
        current = nullcontext(self.policy)
        if self.own is None:
            return [(1.0, current)]
        if self.settings.name != "trust_region":
            return [(1.0, self.own.on_device())]
        mix = self.settings.trust_region_mix
        return [(1.0 - mix, self.own.on_device()), (mix, current)]
