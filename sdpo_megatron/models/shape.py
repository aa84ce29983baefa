"""What the trainer must know of a Hugging Face model to build it: `config.json`, read with `json` alone.

Which keys it reads and which values it takes is the family's to say. Anything that this project would compute wrongly
is refused here, by name.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdpo_megatron.errors import ConfigError, quoted
from sdpo_megatron.files import read_text
from sdpo_megatron.models.config_values import positive, value_of, whole
from sdpo_megatron.models.families import FAMILIES, Family
from sdpo_megatron.models.families.base import Field, Parameter
from sdpo_megatron.models.rope import RopeScaling, read_rope, refuse_two_ropes, with_flat_ropes


@dataclass(frozen=True, kw_only=True)
class Sliding:
    """Layers that do not see the whole context."""

    window: int
    """Tokens that a token sees there, itself included: the last ones."""
    layers: tuple[int, ...]
    """Their numbers, from 0."""


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The feed-forward networks of a layer of which each token takes some, by a router's softmax."""

    count: int
    chosen: int
    """How many a token takes: those of the largest probabilities, which weigh what they give."""
    ffn: int
    normalised: bool
    """Whether the weights of those that are taken are made to sum to 1."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The dimensions of a supported model."""

    architecture: str
    """A key of FAMILIES."""
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    ffn: int
    """Of the feed-forward network where a layer has one alone; experts have their own."""
    vocab: int
    """Rows of the embedding matrix."""
    tie_embeddings: bool
    """Whether the LM head is the embedding matrix."""
    rope_theta: float
    rope_scaling: RopeScaling | None
    rms_norm_eps: float
    max_positions: int
    """Longest context that the model was made for, in tokens."""
    eos_ids: tuple[int, ...]
    """Tokens that end a response, those of generation_config.json included."""
    sliding: Sliding | None = None
    """Layers that do not see the whole context; their rotary embedding is not scaled."""
    experts: Experts | None = None
    """Of every layer; None where each has one feed-forward network."""
    sliding_rope_theta: float | None = None
    """The base of their rotary embedding where it has one of its own."""
    query_pre_attn_scalar: float | None = None
    """The number by whose root a query's product with a key is divided where that is not the size of a head."""

    @property
    def family(self) -> Family:
        return FAMILIES[self.architecture]

    @property
    def queries(self) -> int:
        """Numbers in a token's queries: all heads together."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Numbers in a token's keys, and in its values: all key-value heads together."""
        return self.kv_heads * self.head_dim

    @property
    def attention_scale(self) -> float:
        """What a query's product with a key is multiplied with; a scaled rotary embedding may add to it."""
        return 1.0 / math.sqrt(self.query_pre_attn_scalar or self.head_dim)

    @property
    def columns(self) -> int:
        """Columns of a layer's feed-forward network, or of each of its experts."""
        return self.ffn if self.experts is None else self.experts.ffn

    @property
    def cached_per_token(self) -> int:
        """Numbers that a key-value cache keeps of one token, in all layers together."""
        return 2 * self.layers * self.keys

    def sizes_of(self, parameter: Parameter) -> dict[str, list[int]]:
        """Returns Hugging Face name -> size of every tensor that `parameter` is made of, in the order of joining."""
        sizes = (
            {} if self.experts is None else {"experts": self.experts.count, "expert_ffn": self.experts.ffn}
        )
        return {
            name: [sizes.get(dimension) or getattr(self, dimension) for dimension in dimensions]
            for name, dimensions in parameter.parts.items()
        }

    def parameters(self) -> Iterator[Parameter]:
        """Yields all parameters, under whole Hugging Face names, in the order of the network."""
        experts = 0 if self.experts is None else self.experts.count
        return self.family.parameters(self.layers, tied=self.tie_embeddings, experts=experts)


def read_model_shape(directory: Path, key: str = "model.path") -> ModelShape:
    """Reads `directory`/config.json; `key` is the setting that named it.

    Raises ConfigError where the model is missing, damaged or not supported."""
    file = directory / "config.json"
    if not directory.is_dir():
        raise ConfigError(f"{key}: there is no directory {directory}; give a Hugging Face model directory.")
    if not file.is_file():
        raise ConfigError(f"{key}: {directory} has no config.json; give a Hugging Face model directory.")
    values = _read_json(file)
    _check_kinds(values, file)
    architecture = (values.get("architectures") or ["none"])[0]
    family = FAMILIES.get(architecture) if isinstance(architecture, str) else None
    if family is None:
        raise ConfigError(
            f"{file}: architecture {architecture} is not supported; supported: {', '.join(FAMILIES)}."
        )
    _refuse_unsupported(values, family, file)
    fields = family.fields
    hidden, vocab = whole(values, fields["hidden"], file), whole(values, fields["vocab"], file)
    layers = whole(values, fields["layers"], file)
    heads, kv_heads, head_dim = _heads(values, family, hidden, file)
    of_sliding, of_scalar = fields.get("sliding_rope_theta"), fields.get("query_pre_attn_scalar")
    if of_sliding is not None:
        values = with_flat_ropes(values, of_sliding, file)
    theta, scaling = read_rope(values, fields["rope_theta"], file)
    refuse_two_ropes(values, file)
    if family.window == "of some layers" and of_sliding is None:
        # SGLang reads it there alone
        positive(values, fields["rope_theta"], file)
    max_positions = whole(values, fields["max_positions"], file)
    return ModelShape(
        architecture=architecture,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        hidden=hidden,
        ffn=whole(values, fields["ffn"], file),
        vocab=vocab,
        tie_embeddings=bool(value_of(values, fields["tie_embeddings"])),
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=positive(values, fields["rms_norm_eps"], file),
        max_positions=max_positions,
        eos_ids=_eos_ids(values, directory, vocab),
        sliding=_sliding(values, family, layers, max_positions, file),
        experts=_experts(values, family, file),
        sliding_rope_theta=None if of_sliding is None else positive(values, of_sliding, file),
        query_pre_attn_scalar=None if of_scalar is None else positive(values, of_scalar, file),
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must hold a JSON object.")
    return values


FOREIGN = re.compile(
    "softcap|soft_cap|multiplier|logits?_scal|scale_emb|scale_depth|dim_model_base|query_pre_attn|clip_qkv|no_rope|"
    "parallel_residual|alibi|residual_scal|attention_scal|attn_scal|shared_expert"
)
"""In keys that change what models of other families compute. None, false and 1 change nothing."""
LAYER_TYPES = ("sliding_attention", "full_attention")
KINDS: dict[str, tuple[str, type]] = {
    "architectures": ("list", list),
    "layer_types": ("list", list),
    "rope_parameters": ("JSON object", dict),
    "rope_scaling": ("JSON object", dict),
    "norm_topk_prob": ("boolean", bool),
    "tie_word_embeddings": ("boolean", bool),
}
"""The kinds of the keys that may be missing or null."""


def _check_kinds(values: Mapping[str, Any], file: Path) -> None:
    for key, (name, kind) in KINDS.items():
        value = values.get(key)
        if value is not None and not isinstance(value, kind):
            raise ConfigError(f"{file}: {key} is {quoted(value)}; it must be a {name}.")


def _heads(values: Mapping[str, Any], family: Family, hidden: int, file: Path) -> tuple[int, int, int]:
    """Attention heads, key-value heads, and the size of each."""
    fields = family.fields
    of_heads, of_kv_heads, of_head_dim = fields["heads"], fields["kv_heads"], fields["head_dim"]
    heads = whole(values, of_heads, file)
    kv_heads = heads if value_of(values, of_kv_heads) is None else whole(values, of_kv_heads, file)
    if heads % kv_heads:
        raise ConfigError(
            f"{file}: {of_kv_heads.key} is {kv_heads}, which does not divide {of_heads.key}={heads}; take both from "
            "the model's makers."
        )
    if value_of(values, of_head_dim) is not None:
        head_dim = whole(values, of_head_dim, file)
    elif hidden % heads:
        raise ConfigError(
            f"{file}: {of_heads.key} is {heads}, which does not divide {fields['hidden'].key}={hidden}, and there is "
            f"no {of_head_dim.key}; add it."
        )
    else:
        head_dim = hidden // heads
    if family.norm_over_heads and heads * head_dim != hidden:
        raise ConfigError(
            f"{file}: {of_head_dim.key} is {head_dim}, but SGLang takes {fields['hidden'].key} / {of_heads.key} = "
            f"{hidden / heads:g} in models of {family.model_type}; other sizes are not supported."
        )
    if head_dim % 2:
        raise ConfigError(f"{file}: a head has {head_dim} dimensions; rotary embeddings need an even number.")
    return heads, kv_heads, head_dim


def _refuse_unsupported(values: Mapping[str, Any], family: Family, file: Path) -> None:
    kind = values.get("model_type")
    if kind is not None and kind != family.model_type:
        raise ConfigError(
            f"{file}: model_type is {quoted(kind)}, but architecture {family.architecture} is of {family.model_type}; "
            "take config.json from the model's makers."
        )
    own = {*family.only, *(field.key for field in family.fields.values())}
    for key, value in values.items():
        # True is 1 to Python
        changes_nothing = value is False or (value in (None, 1, [], {}) and value is not True)
        if key not in own and FOREIGN.search(key) and not changes_nothing:
            raise ConfigError(
                f"{file}: {key} is {quoted(value)}, which models of {family.model_type} do not have and would be left "
                "out; remove it where the model needs none."
            )
    if values.get("auto_map"):
        raise ConfigError(
            f"{file}: auto_map names code of the model's own, which is not run here; where the model is computed as "
            f"every {family.model_type}, remove it."
        )
    for key, only in family.only.items():
        value = values.get(key)
        items = value if isinstance(value, list) else [value]
        if value is not None and any(item != only.value for item in items):
            raise ConfigError(
                f"{file}: {key} is {quoted(value)}, which is not supported; supported: {only.shown}."
            )


def _experts(values: Mapping[str, Any], family: Family, file: Path) -> Experts | None:
    fields = family.fields
    if "experts" not in fields:
        return None
    count, chosen = whole(values, fields["experts"], file), whole(values, fields["chosen_experts"], file)
    names = (fields["experts"].key, fields["experts"].also or "")
    if (other := values.get(names[1])) not in (None, count):
        raise ConfigError(
            f"{file}: {names[0]} is {count}, and {names[1]} {quoted(other)}, which is another name of it; keep the "
            "right one."
        )
    # of two or more: one alone always has the weight 1, and the router would not learn
    if not 2 <= chosen <= count:
        raise ConfigError(
            f"{file}: {fields['chosen_experts'].key} is {chosen}; it must be from 2 to {fields['experts'].key}={count}."
        )
    return Experts(
        count=count,
        chosen=chosen,
        ffn=whole(values, fields["expert_ffn"], file),
        normalised=bool(value_of(values, fields["normalised"])),
    )


def _sliding(
    values: Mapping[str, Any], family: Family, layers: int, max_positions: int, file: Path
) -> Sliding | None:
    """The layers that do not see the whole context. A missing sliding_window is the family's, null is none."""
    field = family.fields.get("sliding_window")
    if field is None or (values.get(field.key, field) is None and family.window == "not served"):
        return None
    if family.window == "not served":
        window = whole(values, field, file)
        if window < max_positions:
            unsaid = "" if field.key in values else " where it is missing"
            raise ConfigError(
                f"{file}: {field.key} is {window}{unsaid}, which SGLang does not compute; write null if the model "
                f"needs none, or set max_position_embeddings to {window}: up to there it makes no difference."
            )
        return None
    sliding = _sliding_layers(values, family, layers, file)
    if not sliding:
        return None
    window = whole({field.key: values.get(field.key, field.default)}, Field(field.key), file)
    return Sliding(window=window, layers=sliding)


def _sliding_layers(values: Mapping[str, Any], family: Family, layers: int, file: Path) -> tuple[int, ...]:
    kinds = values.get("layer_types")
    if kinds is None:
        return tuple(layer for layer in range(layers) if (layer + 1) % family.full_every)
    if len(kinds) != layers or any(kind not in LAYER_TYPES for kind in kinds):
        raise ConfigError(
            f"{file}: layer_types is {quoted(kinds)}; it must be one of {' and '.join(LAYER_TYPES)} for each of "
            f"{layers} layers."
        )
    return tuple(layer for layer, kind in enumerate(kinds) if kind == LAYER_TYPES[0])


def _eos_ids(values: Mapping[str, Any], directory: Path, vocab: int) -> tuple[int, ...]:
    sources = {directory / "config.json": values}
    generation = directory / "generation_config.json"
    if generation.is_file():
        sources[generation] = _read_json(generation)
    ids: list[int] = []
    for file, source in sources.items():
        eos = source.get("eos_token_id")
        for token_id in eos if isinstance(eos, list) else [] if eos is None else [eos]:
            if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < vocab:
                raise ConfigError(
                    f"{file}: eos_token_id holds {quoted(token_id)}; it must be token ids from 0 to {vocab - 1}."
                )
            ids.append(token_id)
    return tuple(dict.fromkeys(ids))
