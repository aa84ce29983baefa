"""Final hidden states that one pass leaves for a later one, from which logits are made again chunk by chunk: D numbers
a token in the place of V. They are the teacher's, and the policy's before a batch's first optimizer step."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdpo_megatron.algorithm.batching import Microbatch
from sdpo_megatron.kernels.from_hidden import TeacherPart
from sdpo_megatron.trainer.forward import run_microbatches
from sdpo_megatron.trainer.parallel import ParallelState
from sdpo_megatron.trainer.ragged import Ragged

Weights = AbstractContextManager[list[nn.Module]]
"""The chunks of a model, which may have to be brought to the device."""


@dataclass(frozen=True)
class KeptStates:
    """What passes of one or more models over the same tokens left on this rank; no rows before the last stage."""

    row_B: Tensor
    """For each token, in the batch's order, the row that predicts it, -1 for none; int64, on the CPU."""
    models: list[tuple[float, Tensor, Tensor]]
    """(share, hidden_RD, head_VD) of each model; their logits are added up, times their shares."""

    def parts(self, row_U: Tensor) -> list[TeacherPart]:
        return [TeacherPart(share, hidden_RD, head_VD, row_U) for share, hidden_RD, head_VD in self.models]


def keep_states(
    mixture: Sequence[tuple[float, Weights]],
    microbatches: Sequence[Microbatch],
    ragged: Ragged,
    parallel: ParallelState,
    *,
    copy_head: bool = False,
) -> KeptStates:
    """Passes the micro-batches through each model in `mixture` and keeps the states. With `copy_head` the head is
    copied, for weights that will change before the states are used."""
    row_B = torch.full((int(ragged.starts[-1]),), -1, dtype=torch.int64)
    models = []
    for share, weights in mixture:
        hidden_RD, head_VD = _pass(weights, microbatches, ragged, row_B, parallel)
        if len(hidden_RD):
            models.append((share, hidden_RD, head_VD.clone() if copy_head else head_VD))
    return KeptStates(row_B, models)


def _pass(
    weights: Weights,
    microbatches: Sequence[Microbatch],
    ragged: Ragged,
    row_B: Tensor,
    parallel: ParallelState,
) -> tuple[Tensor, Tensor]:
    """(hidden_RD, head_VD) of one model; which rows are whose goes into `row_B`, the same for every model."""
    heads: list[Tensor] = []

    def at_loss(microbatch: Microbatch, hidden_HD: Tensor, head_VD: Tensor) -> tuple[Tensor, dict[str, Any]]:
        heads.append(head_VD.detach())
        kept = {"place_M": ragged.place_M(microbatch), "hidden_row_M": microbatch.hidden_row_M}
        # as the head reads it: megatron widens it to float32
        kept["hidden_HD"] = hidden_HD.to(head_VD.dtype)
        return hidden_HD.new_zeros(()), kept

    with weights as chunks:
        results = run_microbatches(chunks, microbatches, at_loss, parallel, learn=False)
    first = 0
    for result in results:
        row_B[result["place_M"]] = result["hidden_row_M"] + first
        first += len(result["hidden_HD"])
    if not results:
        return torch.zeros(0, 0), torch.zeros(0, 0)
    return torch.cat([result["hidden_HD"] for result in results]), heads[0]
