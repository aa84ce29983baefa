"""A Hugging Face directory as one that megatron-core reads."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from sdpo_megatron.conversion.dist_writing import DistWriter
from sdpo_megatron.conversion.dtypes import Rounding
from sdpo_megatron.conversion.placement import Place
from sdpo_megatron.errors import ConfigError
from sdpo_megatron.models.hf_tensors import HfTensors
from sdpo_megatron.models.shape import ModelShape
from sdpo_megatron.trainer.hf_weights import ARRANGEMENTS

ROWS_BYTES = 64 * 2**20
"""What is written at once of a tensor that has a row for each token, counted in float32."""


def dtypes_of(places: Sequence[Place], source: HfTensors, rounding: Rounding) -> list[torch.dtype]:
    """Returns the type of each place. Raises ConfigError where what becomes one tensor differs in that."""
    if rounding.dtype is not None:
        return [rounding.dtype] * len(places)
    found: dict[str, torch.dtype] = {}
    for place in places:
        parts = place.parameter.parts
        kind, *others = {source.dtypes[name] for name in parts}
        if others:
            raise ConfigError(
                f"{source.directory} has {' and '.join(parts)}, which become one tensor, in different types; say by "
                "--dtype in which all are to be."
            )
        if found.setdefault(place.key, kind) != kind:
            raise ConfigError(
                f"{source.directory} has {' and '.join(parts)} in another type than in other layers, with which they "
                "become one tensor; say by --dtype in which all are to be."
            )
    return [found[place.key] for place in places]


def write_megatron(
    directory: Path,
    places: Sequence[Place],
    states: Mapping[str, int],
    source: HfTensors,
    shape: ModelShape,
    *,
    tp: int,
    pp: int,
    rounding: Rounding,
    on_bytes: Callable[[int], None],
) -> None:
    """Fills `directory` as `tp` * `pp` ranks would, a file each; `on_bytes` hears how much was read. Memory holds a
    joined tensor about twice, and of the vocabulary some rows.

    What says that there is a checkpoint is written last."""

    def read(name: str, begin: int = 0, rows: int | None = None) -> Tensor:
        stored = source.read(name, begin, rows)
        on_bytes(stored.nbytes)
        return rounding.apply(stored, name)

    def parts_of(place: Place) -> Iterator[tuple[int, int, int, Tensor]]:
        """The rank, and which dimension of the place's own tensor the part is of, from where on."""
        if place.is_vocabulary:
            (name,) = place.parameter.parts
            at_once = max(ROWS_BYTES // (4 * math.prod(place.sizes[1:])), 1)
            for rank, _, begin, length in _cuts(place, tp):
                for first in range(begin, begin + length, at_once):
                    count = min(at_once, begin + length - first)
                    stored = read(name, min(first, shape.vocab), max(min(count, shape.vocab - first), 0))
                    yield rank, 0, first, pad(stored, (0, 0, 0, count - len(stored)))
        else:
            parts = [read(name) for name in place.parameter.parts]
            joined = ARRANGEMENTS[place.parameter.rule].join(parts, shape, tp)
            for rank, dimension, begin, length in _cuts(place, tp):
                yield rank, dimension, begin, joined.narrow(dimension, begin, length)

    def file_of(layer: int, rank: int) -> str:
        stage = layer * pp // shape.layers
        return f"__{stage * tp + rank}_0.distcp"

    writer = DistWriter(directory)
    for name, layer in states.items():
        writer.add_nothing(file_of(layer, 0), name)
    for place in places:
        for rank, dimension, begin, part in parts_of(place):
            writer.add(file_of(place.layer, rank), place, part, dimension, begin)
    writer.finish()


def _cuts(place: Place, tp: int) -> Iterator[tuple[int, int, int, int]]:
    """Yields rank, dimension, begin and length of each part of a place that one of `tp` ranks writes: the first one
    where all hold all of it."""
    arrangement = ARRANGEMENTS[place.parameter.rule]
    cut = arrangement.cut
    if cut is None:
        yield 0, 0, 0, place.sizes[0]
        return
    piece = place.sizes[cut] // arrangement.pieces
    own = piece // tp
    for rank in range(tp):
        for number in range(arrangement.pieces):
            yield rank, cut, number * piece + rank * own, own
