"""Weights in megatron-core's format as a Hugging Face directory."""

from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from sdpo_megatron.conversion.dtypes import Rounding
from sdpo_megatron.conversion.placement import Place, Placement
from sdpo_megatron.conversion.safetensors_writing import SHARD_BYTES, Announced, write_safetensors
from sdpo_megatron.conversion.sources import MegatronWeights
from sdpo_megatron.trainer.hf_weights import ARRANGEMENTS


def parts_of(place: Place, source: MegatronWeights) -> Iterator[tuple[str, Tensor]]:
    """Yields the Hugging Face names and tensors that lie at `place`, as they are stored."""
    tensor = source.reader.read(
        source.key_of(place), (*place.before, *(0 for _ in place.sizes)), (*_ones(place), *place.sizes)
    ).view(place.sizes)
    names = list(place.parameter.parts)
    parts = ARRANGEMENTS[place.parameter.rule].split(tensor, source.shape)
    yield from zip(names, parts, strict=True)


def _ones(place: Place) -> tuple[int, ...]:
    return (1,) * len(place.before)


def announced(placement: Placement, source: MegatronWeights, rounding: Rounding) -> dict[str, Announced]:
    """Returns what will be written, in that order."""
    return {
        name: Announced(dtype=rounding.of(source.reader.dtype_of(source.key_of(place))), sizes=tuple(size))
        for place in placement.places
        for name, size in source.shape.sizes_of(place.parameter).items()
    }


def write_hf(
    directory: Path,
    placement: Placement,
    source: MegatronWeights,
    *,
    rounding: Rounding,
    on_bytes: Callable[[int], None],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes the weights' files into `directory`; `on_bytes` hears how much was written. Memory holds one joined tensor
    about twice."""

    def stream() -> Iterator[tuple[str, Tensor]]:
        for place in placement.places:
            for name, part in parts_of(place, source):
                tensor = rounding.apply(part, name)
                yield name, tensor
                on_bytes(tensor.nbytes)

    write_safetensors(directory, announced(placement, source, rounding), stream(), shard_bytes)
