"""A Hugging Face directory as one that megatron-core reads."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sdpo_megatron.conversion.dist_writing import write_dist
from sdpo_megatron.conversion.dtypes import Rounding
from sdpo_megatron.conversion.hf_reading import HfReader
from sdpo_megatron.conversion.placement import Place, Placement
from sdpo_megatron.errors import ConfigError
from sdpo_megatron.models.shape import ModelShape
from sdpo_megatron.trainer.hf_weights import ARRANGEMENTS
from sdpo_megatron.trainer.model import padded_vocab_size


def joined(place: Place, source: HfReader, shape: ModelShape, tp: int, rounding: Rounding) -> Tensor:
    """Returns the tensor of `place`, padded for `tp` ranks where it has a row for each token."""
    parts = [rounding.apply(source.read(name), name) for name in place.parameter.parts]
    return ARRANGEMENTS[place.parameter.rule].join(parts, shape, tp)


def dtype_of_keys(placement: Placement, source: HfReader, rounding: Rounding) -> dict[str, torch.dtype]:
    """Returns the type of each key. Raises ConfigError where the layers under it differ in that."""
    kinds: dict[str, torch.dtype] = {}
    for place in placement.places:
        if rounding.dtype is not None:
            kinds[place.key] = rounding.dtype
            continue
        kind = source.dtype_of(place.parameter)
        if kinds.setdefault(place.key, kind) != kind:
            raise ConfigError(
                f"{source.directory} has {' and '.join(place.parameter.parts)} in another type than in other layers, "
                "with which they become one tensor; say by --dtype in which all are to be."
            )
    return kinds


def write_megatron(
    directory: Path,
    placement: Placement,
    source: HfReader,
    shape: ModelShape,
    *,
    tp: int,
    pp: int,
    rounding: Rounding,
    on_bytes: Callable[[int], None],
) -> None:
    """Fills `directory`; `on_bytes` hears how much was read. Memory holds one joined tensor about twice."""

    def read(place: Place) -> Tensor:
        tensor = joined(place, source, shape, tp, rounding)
        on_bytes(sum(_bytes(source, name, size) for name, size in shape.sizes_of(place.parameter).items()))
        return tensor

    rows = padded_vocab_size(shape.vocab, tp)
    write_dist(directory, placement, shape.layers, read, tp=tp, pp=pp, rows=rows)


def _bytes(source: HfReader, name: str, size: list[int]) -> int:
    return torch.Size(size).numel() * source.dtypes[name].itemsize
