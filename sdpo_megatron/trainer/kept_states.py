"""Final hidden states that one pass leaves for a later one, from which logits are made again chunk by chunk: D numbers
a token in the place of V. They are the teacher's, and the policy's before a batch's first optimizer step."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sdpo_megatron.algorithm.batching import Microbatch
from sdpo_megatron.kernels.from_hidden import HiddenPart
from sdpo_megatron.records import Sample
from sdpo_megatron.trainer.forward import run_microbatches
from sdpo_megatron.trainer.parallel import ParallelState
from sdpo_megatron.trainer.ragged import Ragged

Weights = AbstractContextManager[list[nn.Module]]
"""The chunks of a model, which may have to be brought to the device."""


Place = Literal["device", "host"]
SHARE_OF_DEVICE = 4
"""By default states may take this part of a device's free memory, one in so many."""


@dataclass(frozen=True)
class KeptStates:
    """What passes of one or more models over the same tokens left on this rank; no rows before the last stage."""

    row_B: Tensor
    """For each token, in the batch's order, the row that predicts it, -1 for none; int64, on the CPU."""
    models: list[tuple[float, Tensor, Tensor]]
    """(share, hidden_RD, head_VD) of each model; their logits are added up, times their shares."""
    on_host: bool = False
    """Whether any hidden states are in host memory; all are then taken as those are. Heads are on the device."""

    def parts(self, row_U: Tensor) -> list[HiddenPart]:
        """Returns what the loss needs of these rows, on their device."""
        if not self.on_host:
            return [HiddenPart(share, hidden_RD, head_VD, row_U) for share, hidden_RD, head_VD in self.models]
        needed_R, place_U = row_U.unique(return_inverse=True)
        needed_R = needed_R.cpu()
        return [
            HiddenPart(share, hidden_RD[needed_R].to(row_U.device), head_VD, place_U)
            for share, hidden_RD, head_VD in self.models
        ]


Teaching = KeptStates | Callable[[Sequence[Sample]], KeptStates]
"""What a teacher's pass left, or what passes over some of a mini-batch's samples when they are learned from."""


def keep_states(
    mixture: Sequence[tuple[float, Weights]],
    microbatches: Sequence[Microbatch],
    ragged: Ragged,
    parallel: ParallelState,
    *,
    place: Place | None,
    copy_head: bool = False,
) -> KeptStates:
    """Passes the micro-batches through each model in `mixture` and keeps the states, by default on the device where
    they are small there. With `copy_head` the head is copied, for weights that will change before the states are
    used."""
    row_B = torch.full((int(ragged.starts[-1]),), -1, dtype=torch.int64)
    rows = sum(len(microbatch.place_H) for microbatch in microbatches)
    is_cuda, on_host = parallel.device.type == "cuda", place == "host"

    def empty(width: int, dtype: torch.dtype) -> Tensor:
        nonlocal on_host
        if place is None and is_cuda:
            size = len(mixture) * rows * width * dtype.itemsize
            # what is free when the first model has passed may not be when the second has
            on_host |= SHARE_OF_DEVICE * size > torch.cuda.mem_get_info(parallel.device)[0]
        if on_host:
            return torch.empty(rows, width, dtype=dtype, pin_memory=is_cuda)
        return torch.empty(rows, width, dtype=dtype, device=parallel.device)

    models = []
    for share, weights in mixture:
        for hidden_RD, head_VD in _passed(weights, microbatches, ragged, row_B, parallel, empty):
            models.append((share, hidden_RD, head_VD.clone() if copy_head else head_VD))
    return KeptStates(row_B, models, on_host)


def _passed(
    weights: Weights,
    microbatches: Sequence[Microbatch],
    ragged: Ragged,
    row_B: Tensor,
    parallel: ParallelState,
    empty: Callable[[int, torch.dtype], Tensor],
) -> list[tuple[Tensor, Tensor]]:
    """One model's states, in one tensor, since joining the micro-batches' would hold them twice, and its head; empty
    before the last stage. Which rows are whose goes into `row_B`, the same for every model."""
    kept: list[tuple[Tensor, Tensor]] = []
    begin = 0

    def at_loss(microbatch: Microbatch, hidden_HD: Tensor, head_VD: Tensor) -> tuple[Tensor, dict[str, Any]]:
        nonlocal begin
        if not kept:
            # in the type in which the head reads them: megatron widens it to float32
            kept.append((empty(hidden_HD.shape[1], head_VD.dtype), head_VD.detach()))
        kept[0][0][begin : begin + len(hidden_HD)] = hidden_HD
        row_B[ragged.place_M(microbatch)] = microbatch.hidden_row_M + begin
        begin += len(hidden_HD)
        return hidden_HD.new_zeros(()), {}

    with weights as chunks:
        run_microbatches(chunks, microbatches, at_loss, parallel, learn=False)
    return kept
