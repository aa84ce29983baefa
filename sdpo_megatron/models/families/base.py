"""What a family of models is: one table that reading config.json, checking weight files, building the model, and
carrying weights between Hugging Face and megatron all derive from.

It holds names and rules alone, so that a model can be checked before torch is imported; `trainer/hf_weights.py` does
with tensors what a Rule says.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any, Literal

LAYERS = "model.layers"
"""What stands before the number of a layer in the names of its Hugging Face tensors."""
EXPERT = "{expert}"

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
    per_expert: bool = False
    """Whether each expert of a layer has one; in the names its number, from 0, stands for EXPERT."""
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


@dataclass(frozen=True, kw_only=True)
class Family:
    """All that is told of the models of one architecture."""

    architecture: str
    """The architecture's name in config.json."""
    model_type: str
    """What config.json calls the family."""
    fields: Mapping[str, Field]
    """Attribute of ModelShape -> where config.json has it."""
    only: Mapping[str, Only]
    """Key of config.json -> what it must say."""
    transformer: Mapping[str, Any]
    """Arguments of megatron's TransformerConfig that all models of the family share."""
    activation: Literal["silu", "gelu_pytorch_tanh"]
    """What the feed-forward network's gate passes through."""
    norms: Literal["before", "after", "around"]
    """Whether a layer's attention and feed-forward network have their RMSNorms before them, after them and before the
    sum, or both."""
    scaled_embedding: bool
    """Whether a token's embedding is multiplied with the root of its size, rounded to the model's type."""
    norm_over_heads: bool
    """Whether queries, and keys, pass through one RMSNorm over all heads together. TransformerConfig's `qk_layernorm`
    is another one, of each head alone."""
    window: Literal["none", "of some layers", "not served"]
    """What the field `sliding_window`, if there is one, means: a window of the layers that `layer_types` names, or one
    of all layers, which SGLang does not compute."""
    full_every: int
    """Where windows are of some layers and `layer_types` does not say which, each layer of so many has none."""
    served_whole: bool
    """Whether each rank of a server holds the whole embedding, without padding."""
    embedding: Parameter
    layer: tuple[Parameter, ...]
    final_norm: Parameter
    head: Parameter
    """The LM head; where it is tied, Hugging Face has the embedding alone."""

    def of_layer(self, layer: int, experts: int) -> Iterator[Parameter]:
        """Yields the parameters of layer `layer`, counted from 0, which has so many `experts`."""
        for parameter in self.layer:
            of_all = map(parameter.of_expert, range(experts)) if parameter.per_expert else [parameter]
            for one in of_all:
                yield one.of_layer(layer)

    def parameters(self, layers: int, *, tied: bool, experts: int = 0) -> Iterator[Parameter]:
        """Yields all parameters of a model of `layers` layers, under whole Hugging Face names, in the order of the
        network."""
        yield self.embedding
        for layer in range(layers):
            yield from self.of_layer(layer, experts)
        yield self.final_norm
        if not tied:
            yield self.head
