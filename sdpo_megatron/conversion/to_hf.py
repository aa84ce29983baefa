"""Weights in megatron-core's format as a Hugging Face directory."""

from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from sdpo_megatron.conversion.dtypes import Rounding
from sdpo_megatron.conversion.placement import Place, Placement
from sdpo_megatron.conversion.safetensors_writing import SHARD_BYTES, Announced, write_safetensors
from sdpo_megatron.conversion.sources import MegatronWeights
from sdpo_megatron.trainer.hf_weights import ARRANGEMENTS


def parts_of(place: Place, source: MegatronWeights) -> Iterator[tuple[str, int, Tensor]]:
    """Yields the Hugging Face tensors that lie at `place`, as they are stored: name, the row with which it begins, and
    the numbers. What has a row for each token comes in blocks of rows, anything else whole."""
    key, split = source.key_of(place), ARRANGEMENTS[place.parameter.rule].split
    ones = (1,) * len(place.before)
    if place.is_vocabulary:
        (name,) = place.parameter.parts
        for begin, rows in source.reader.row_blocks(key, len(ones), source.shape.vocab):
            sizes = (rows, *place.sizes[1:])
            offsets = (*place.before, begin, *(0 for _ in sizes[1:]))
            yield name, begin, source.reader.read(key, offsets, (*ones, *sizes)).view(sizes)
        return
    tensor = source.reader.read(key, (*place.before, *(0 for _ in place.sizes)), (*ones, *place.sizes))
    parts = split(tensor.view(place.sizes), source.shape)
    yield from ((name, 0, part) for name, part in zip(place.parameter.parts, parts, strict=True))


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
    """Writes the weights' files into `directory`; `on_bytes` hears how much was written. Memory holds a joined tensor
    about twice, and of the vocabulary what a rank once wrote."""

    def stream() -> Iterator[tuple[str, Tensor]]:
        for place in placement.places:
            for name, _, part in parts_of(place, source):
                tensor = rounding.apply(part, name)
                yield name, tensor
                on_bytes(tensor.nbytes)

    write_safetensors(directory, announced(placement, source, rounding), stream(), shard_bytes)
