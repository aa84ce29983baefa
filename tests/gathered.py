"""What all ranks recorded of a step's samples, as tests compare it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdpo_megatron.records import Sample
from sdpo_megatron.trainer.batch import SEEN, Batch

NAMES = (*SEEN, "old")


def flat(batch: Batch, parallel: Any, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """By name, [B] over all samples in order, 0 where nobody computed the token; on rank 0. Every rank calls it."""
    found = batch.gathered(NAMES, parallel)
    nothing = torch.zeros(sum(len(sample.response_ids_T) for sample in samples))
    return {name: torch.from_numpy(found[name]) if found else nothing for name in NAMES}


def by_sample(columns: dict[str, Tensor], name: str, samples: Sequence[Sample]) -> list[Any]:
    """Per sample its numbers, None for tokens and samples that nobody computed."""
    lengths = [len(sample.response_ids_T) for sample in samples]
    rows = []
    for values, computed in zip(
        columns[name].split(lengths), columns["computed"].split(lengths), strict=True
    ):
        row = [v if c else None for v, c in zip(values.tolist(), computed.tolist(), strict=True)]
        rows.append(row if computed.any() else None)
    return rows
