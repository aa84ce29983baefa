"""What the table of a family is made of, from which reading config.json, checking weight files, building the model, and
carrying weights between Hugging Face and megatron all derive.

It holds names and rules alone, so that a model can be checked before torch is imported; `trainer/hf_weights.py` does
with tensors what a Rule says.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any, Literal

LAYERS = "model.layers"
"""What stands before the number of a layer in the names of its Hugging Face tensors."""
EXPERT = "{expert}"
"""What stands, in the names of what each expert of a layer has, for its number, which begins at 0."""

Dimension = Literal["vocab", "hidden", "ffn", "queries", "keys", "head_dim", "experts", "expert_ffn"]
"""An attribute of ModelShape, or of its Experts."""


class Rule(Enum):
    """How one megatron parameter comes from Hugging Face tensors and is cut over tensor-parallel ranks."""

    WHOLE = auto()
    """One tensor, all of it on every rank."""
    ROWS = auto()
    """One matrix of a row-parallel linear layer: its input, the second dimension, is cut."""
    HEADS = auto()
    """One vector with a number per row of queries or keys, head after head; it is cut between heads."""
    QKV = auto()
    """Query, key and value joined by key-value head: its queries, its key, its value; the first dimension is cut."""
    GATED = auto()
    """Gate and up projection joined, each cut in its first dimension, so that a rank's shard is again gate and up."""
    VOCABULARY = auto()
    """One matrix with a row per token, padded so that each rank has as many rows; the first dimension is cut."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One megatron parameter and the Hugging Face tensors that it is made of."""

    megatron: str
    """The parameter's name in megatron; within the layer if it is of one."""
    fused: str | None = None
    """The parameter's name where Transformer Engine keeps the norm inside the linear layer after it, if that
    differs."""
    rule: Rule
    parts: Mapping[str, tuple[Dimension, ...]]
    """Hugging Face name, within the layer if it is of one, and size of each tensor, in the order of joining."""
    layer: int | None = None
    """The layer that it is of, from 0; None in the table, and where it is of none."""
    expert: int | None = None
    """Likewise the expert."""

    def of_layer(self, layer: int) -> "Parameter":
        """Returns this parameter under the whole Hugging Face names that its parts have in layer `layer`, counted from
        0."""
        parts = {f"{LAYERS}.{layer}.{name}": size for name, size in self.parts.items()}
        return replace(self, parts=parts, layer=layer)

    def of_expert(self, expert: int) -> "Parameter":
        """Returns this parameter of expert `expert`, counted from 0."""
        parts = {name.replace(EXPERT, str(expert)): size for name, size in self.parts.items()}
        return replace(self, megatron=self.megatron.replace(EXPERT, str(expert)), parts=parts, expert=expert)

    def stored(self) -> list[str]:
        """Returns the names that megatron-core may keep it under in a directory: all layers as one tensor, whose first
        dimension is the layer, and all experts, whose second one is the expert."""
        prefix = "" if self.layer is None else "decoder.layers."
        names = [name for name in (self.fused, self.megatron) if name]
        if self.expert is not None:
            names = [name.replace(f"local_experts.{self.expert}.", "experts.") for name in names]
        return [f"{prefix}{name}" for name in names]


@dataclass(frozen=True)
class Field:
    """A number or switch of config.json."""

    key: str
    default: float | None = None
    """What a missing or null key means; None: it must be there. Heads of keys and the size of a head follow from the
    other sizes instead."""
    also: str | None = None
    """Another key under which it may stand."""


@dataclass(frozen=True)
class Only:
    """A key of config.json that may have one value: the model would be computed wrongly with any other.

    A missing or null key means that value. In a list every item must be it."""

    value: Any
    shown: str
    """The value in messages."""
