"""Where each weight of a model lies in a torch_dist directory: megatron-core keeps a parameter of all layers as one
tensor with the layer as first dimension, and one of all experts with the expert as second, whole and in no layout's
order."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sdpo_megatron.models.families.base import Parameter, Rule
from sdpo_megatron.models.shape import ModelShape
from sdpo_megatron.trainer.model import build_model, unwrap
from sdpo_megatron.trainer.parallel import ParallelState

LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Place:
    """One megatron parameter of the whole model, in no layout."""

    parameter: Parameter
    before: tuple[int, ...]
    """Where it begins along the axes that stand before its own: its layer, and its expert."""
    sizes_before: tuple[int, ...]
    """The sizes of those axes."""
    sizes: tuple[int, ...]
    """Its own."""
    layer: int
    """The layer that it is of, or whose pipeline stage it is on."""

    @property
    def key(self) -> str:
        """The name that it gets in a new directory."""
        return self.parameter.stored()[0]

    @property
    def is_vocabulary(self) -> bool:
        return self.parameter.rule is Rule.VOCABULARY

    @property
    def whole(self) -> tuple[int, ...]:
        """The size of all that is stored under its name."""
        return (*self.sizes_before, *self.sizes)


def places_of(shape: ModelShape, rows: int | None = None) -> list[Place]:
    """Returns those of all parameters in the order of the network, with the vocabulary filled up to `rows`, by default
    as it is."""
    experts = 0 if shape.experts is None else shape.experts.count
    places: list[Place] = []
    for parameter in shape.parameters():
        axes = [(parameter.layer, shape.layers), (parameter.expert, experts)]
        before = [(number, size) for number, size in axes if number is not None]
        parts = list(shape.sizes_of(parameter).values())
        first = sum(part[0] for part in parts)
        if parameter.rule is Rule.VOCABULARY and rows is not None:
            first = rows
        outside = shape.layers - 1 if places else 0
        places.append(
            Place(
                parameter=parameter,
                before=tuple(number for number, _ in before),
                sizes_before=tuple(size for _, size in before),
                sizes=(first, *parts[0][1:]),
                layer=outside if parameter.layer is None else parameter.layer,
            )
        )
    return places


def states_of(shape: ModelShape, parallel: ParallelState) -> dict[str, int]:
    """Returns what else megatron-core asks a directory for, the states of modules: names, and the layer each is of. It
    says so itself, of a model that has no numbers; `parallel` is that of a lone rank."""
    nowhere = replace(parallel, device=torch.device("meta"))
    with nowhere.device:
        (model,) = build_model(shape, torch.float32, nowhere, transformer_engine=False)
    described: Mapping[str, Any] = unwrap(model).sharded_state_dict(prefix="")
    states: dict[str, int] = {}
    for name, sharding in described.items():
        if hasattr(sharding, "data") and not isinstance(sharding.data, Tensor):
            found = LAYER.match(name)
            states[sharding.unique_key] = int(found[1]) if found else 0
    return states
