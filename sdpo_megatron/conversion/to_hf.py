"""Weights in megatron-core's format as a Hugging Face directory."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from sdpo_megatron.conversion.dtypes import Rounding
from sdpo_megatron.conversion.safetensors_writing import SHARD_BYTES, write_safetensors
from sdpo_megatron.conversion.stored_weights import StoredWeights


def announced(source: StoredWeights, rounding: Rounding) -> dict[str, Tensor]:
    """Returns what will be written, in that order: tensors without numbers."""
    return {
        name: torch.empty(
            size, dtype=rounding.of(source.reader.dtype_of(source.key_of(place))), device="meta"
        )
        for place in source.places
        for name, size in source.shape.sizes_of(place.parameter).items()
    }


def write_hf(
    directory: Path,
    source: StoredWeights,
    *,
    rounding: Rounding,
    on_bytes: Callable[[int], None],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes the weights' files into `directory`; `on_bytes` hears how much was written. Memory holds a joined tensor
    about twice, and of the vocabulary what a rank once wrote."""

    def stream() -> Iterator[tuple[str, Tensor]]:
        for place in source.places:
            for name, _, part in source.blocks_of(place):
                tensor = rounding.apply(part, name)
                yield name, tensor
                on_bytes(tensor.nbytes)

    write_safetensors(directory, announced(source, rounding), stream(), shard_bytes)
