"""Where each weight of a model lies in a torch_dist directory.

megatron-core says so itself, asked with a model that has no numbers: so that every family which can be trained can be
converted, under the names that megatron-core's own checkpoints have.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sdpo_megatron.models.families.base import Parameter, Rule
from sdpo_megatron.models.shape import ModelShape
from sdpo_megatron.trainer.hf_weights import ARRANGEMENTS, placed
from sdpo_megatron.trainer.model import build_model, padded_vocab_size, unwrap
from sdpo_megatron.trainer.parallel import ParallelState

LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Place:
    """One megatron parameter of the whole model, in no layout."""

    parameter: Parameter
    key: str
    """Its name in the directory, which the layers share."""
    before: tuple[int, ...]
    """Where it begins along the axes that megatron-core puts before its own: its layer, say."""
    sizes_before: tuple[int, ...]
    """The sizes of those axes."""
    sizes: tuple[int, ...]
    """Its own, with the vocabulary as it is: without padding."""
    layer: int
    """The layer that it is of, or whose pipeline stage it is on."""

    @property
    def is_vocabulary(self) -> bool:
        return self.parameter.rule is Rule.VOCABULARY

    def whole(self, rows: int | None = None) -> tuple[int, ...]:
        """Returns the size of everything under its key, with so many `rows` where they are padded."""
        own = self.sizes if rows is None or not self.is_vocabulary else (rows, *self.sizes[1:])
        return (*self.sizes_before, *own)

    def numbers(self, rows: int) -> int:
        """Returns how many it has, with so many `rows` where they are padded."""
        return math.prod(self.whole(rows)[len(self.before) :])

    def cuts(self, sizes: tuple[int, ...], tp: int) -> list[list[tuple[int, int, int]]]:
        """Returns, for each of `tp` ranks, the (dimension, begin, length) of the parts of a tensor of `sizes` that it
        holds; an empty list of ranks' parts but the first one's where all hold all of it."""
        arrangement = ARRANGEMENTS[self.parameter.rule]
        cut = arrangement.cut
        if cut is None:
            return [[(0, 0, sizes[0])], *([] for _ in range(tp - 1))]
        piece = sizes[cut] // arrangement.pieces
        own = piece // tp
        return [
            [(cut, number * piece + rank * own, own) for number in range(arrangement.pieces)]
            for rank in range(tp)
        ]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A whole model's."""

    places: list[Place]
    """In the order of the network."""
    objects: dict[str, int]
    """What else megatron-core reads of a directory, and asks for: names, and the layer each is of."""


def placement_of(shape: ModelShape, parallel: ParallelState) -> Placement:
    """Returns the model's; `parallel` is that of a lone rank."""
    nowhere = replace(parallel, device=torch.device("meta"))
    with nowhere.device:
        chunks = build_model(shape, torch.float32, nowhere, transformer_engine=False)
    model = unwrap(chunks[0])
    described: Mapping[str, Any] = model.sharded_state_dict(prefix="")
    names = {id(weight): name for name, weight in model.named_parameters()}
    shardings = {id(sharding.data): sharding for sharding in described.values()}
    places: list[Place] = []
    for weight, parameter in placed(chunks, shape):
        found = LAYER.match(names[id(weight)])
        layer = int(found[1]) if found else 0 if not places else shape.layers - 1
        places.append(_place(weight, parameter, shardings[id(weight)], shape, layer))
    objects: dict[str, int] = {}
    for name, sharding in described.items():
        if not hasattr(sharding, "data") or isinstance(sharding.data, Tensor):
            continue
        found = LAYER.match(name)
        objects[sharding.unique_key] = int(found[1]) if found else 0
    return Placement(places=places, objects=objects)


def _place(weight: Tensor, parameter: Parameter, sharding: Any, shape: ModelShape, layer: int) -> Place:
    # a gated layer's weight is described as its parts
    parts = sharding.build() if hasattr(sharding, "build") else sharding
    if isinstance(parts, dict):
        parts = list(parts.values())
    first, *others = parts if isinstance(parts, list) else [parts]
    if any(other.key != first.key for other in others):
        raise RuntimeError(f"megatron-core stores {parameter.megatron} under several names.")
    axes = first.prepend_axis_num
    sizes = tuple(weight.shape)
    if parameter.rule is Rule.VOCABULARY:
        assert sizes[0] == padded_vocab_size(shape.vocab, 1)
        sizes = (shape.vocab, *sizes[1:])
    return Place(
        parameter=parameter,
        key=first.key,
        before=tuple(first.global_offset[:axes]),
        sizes_before=tuple(first.global_shape[:axes]),
        sizes=sizes,
        layer=layer,
    )
