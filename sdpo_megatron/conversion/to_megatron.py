"""A Hugging Face directory as one that megatron-core reads."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sdpo_megatron.conversion.dist_writing import write_dist
from sdpo_megatron.conversion.dtypes import Rounding
from sdpo_megatron.conversion.placement import Place, Placement
from sdpo_megatron.errors import ConfigError
from sdpo_megatron.models.hf_tensors import HfTensors
from sdpo_megatron.models.shape import ModelShape
from sdpo_megatron.trainer.hf_weights import ARRANGEMENTS
from sdpo_megatron.trainer.model import padded_vocab_size


def dtype_of_keys(placement: Placement, source: HfTensors, rounding: Rounding) -> dict[str, torch.dtype]:
    """Returns the type of each key. Raises ConfigError where what is under it differs in that."""
    kinds: dict[str, torch.dtype] = {}
    for place in placement.places:
        if rounding.dtype is not None:
            kinds[place.key] = rounding.dtype
            continue
        parts = place.parameter.parts
        kind, *others = {source.dtypes[name] for name in parts}
        if others:
            raise ConfigError(
                f"{source.directory} has {' and '.join(parts)}, which become one tensor, in different types; say by "
                "--dtype in which all are to be."
            )
        if kinds.setdefault(place.key, kind) != kind:
            raise ConfigError(
                f"{source.directory} has {' and '.join(parts)} in another type than in other layers, "
                "with which they become one tensor; say by --dtype in which all are to be."
            )
    return kinds


def write_megatron(
    directory: Path,
    placement: Placement,
    source: HfTensors,
    shape: ModelShape,
    *,
    tp: int,
    pp: int,
    rounding: Rounding,
    on_bytes: Callable[[int], None],
) -> None:
    """Fills `directory`; `on_bytes` hears how much was read. Memory holds a joined tensor about twice, and of the
    vocabulary some rows."""
    weights = _FromHf(source, shape, tp, rounding, on_bytes)
    rows = padded_vocab_size(shape.vocab, tp)
    write_dist(directory, placement, shape.layers, weights, tp=tp, pp=pp, rows=rows)


@dataclass(frozen=True)
class _FromHf:
    source: HfTensors
    shape: ModelShape
    tp: int
    rounding: Rounding
    on_bytes: Callable[[int], None]

    def whole(self, place: Place) -> Tensor:
        parts = [self._read(name) for name in place.parameter.parts]
        return ARRANGEMENTS[place.parameter.rule].join(parts, self.shape, self.tp)

    def rows(self, place: Place, begin: int, count: int) -> Tensor:
        (name,) = place.parameter.parts
        there = max(min(count, self.shape.vocab - begin), 0)
        found = self._read(name, begin, there) if there else self._read(name, 0, 0)
        return (
            found if there == count else torch.cat([found, found.new_zeros(count - there, *found.shape[1:])])
        )

    def _read(self, name: str, begin: int = 0, rows: int | None = None) -> Tensor:
        stored = self.source.read(name, begin, rows)
        self.on_bytes(stored.nbytes)
        return self.rounding.apply(stored, name)
