"""What the trainer must know of a Hugging Face model to build it: `config.json`, read with `json` alone.

Which keys it reads and which values it takes is the family's to say. Anything that this project would compute wrongly
is refused here, by name.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdpo_megatron.errors import ConfigError, quoted
from sdpo_megatron.files import read_text
from sdpo_megatron.models.families import FAMILIES, Family
from sdpo_megatron.models.families.base import Field, Parameter


@dataclass(frozen=True, kw_only=True)
class Llama3Rope:
    """Frequency scaling of Llama 3.1 and later (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


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
    vocab: int
    """Rows of the embedding matrix."""
    tie_embeddings: bool
    """Whether the LM head is the embedding matrix."""
    rope_theta: float
    rope_scaling: Llama3Rope | None
    rms_norm_eps: float
    max_positions: int
    """Longest context that the model was made for, in tokens."""
    eos_ids: tuple[int, ...]
    """Tokens that end a response, those of generation_config.json included."""

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
    def cached_per_token(self) -> int:
        """Numbers that a key-value cache keeps of one token, in all layers together."""
        return 2 * self.layers * self.keys

    def sizes_of(self, parameter: Parameter) -> dict[str, list[int]]:
        """Returns Hugging Face name -> size of every tensor that `parameter` is made of, in the order of joining."""
        return {
            name: [getattr(self, dimension) for dimension in dimensions]
            for name, dimensions in parameter.parts.items()
        }


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
    hidden, vocab = _whole(values, fields["hidden"], file), _whole(values, fields["vocab"], file)
    heads, kv_heads, head_dim = _heads(values, fields, hidden, file)
    theta, scaling = _rope(values, fields["rope_theta"], file)
    _refuse_two_ropes(values, file)
    return ModelShape(
        architecture=architecture,
        layers=_whole(values, fields["layers"], file),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        hidden=hidden,
        ffn=_whole(values, fields["ffn"], file),
        vocab=vocab,
        tie_embeddings=bool(_value(values, fields["tie_embeddings"])),
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=_positive(values, fields["rms_norm_eps"], file),
        max_positions=_whole(values, fields["max_positions"], file),
        eos_ids=_eos_ids(values, directory, vocab),
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
    "parallel_residual|alibi|residual_scal|attention_scal|attn_scal"
)
"""In keys that change what models of other families compute. None, false and 1 change nothing."""
LARGEST_BITS = 1000
"""Of a whole number that a float can be."""
KINDS: dict[str, tuple[str, type]] = {
    "architectures": ("list", list),
    "layer_types": ("list", list),
    "rope_parameters": ("JSON object", dict),
    "rope_scaling": ("JSON object", dict),
    "tie_word_embeddings": ("boolean", bool),
}
"""The kinds of the keys that may be missing or null."""


def _check_kinds(values: Mapping[str, Any], file: Path) -> None:
    for key, (name, kind) in KINDS.items():
        value = values.get(key)
        if value is not None and not isinstance(value, kind):
            raise ConfigError(f"{file}: {key} is {quoted(value)}; it must be a {name}.")


def _value(values: Mapping[str, Any], field: Field) -> Any:
    value = values.get(field.key)
    return field.default if value is None else value


def _is_one(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == 1


def _whole(values: Mapping[str, Any], field: Field, file: Path) -> int:
    value = _value(values, field)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ConfigError(f"{file}: {field.key} is {quoted(value)}; it must be a positive whole number.")
    return value


def _positive(values: Mapping[str, Any], field: Field, file: Path) -> float:
    value = _value(values, field)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ConfigError(f"{file}: {field.key} is {quoted(value)}; it must be a positive number.")
    if isinstance(value, int) and value.bit_length() > LARGEST_BITS:
        raise ConfigError(f"{file}: {field.key} is {quoted(value)}; it must be a positive number.")
    return float(value)


def _heads(
    values: Mapping[str, Any], fields: Mapping[str, Field], hidden: int, file: Path
) -> tuple[int, int, int]:
    """Attention heads, key-value heads, and the size of each."""
    of_heads, of_kv_heads, of_head_dim = fields["heads"], fields["kv_heads"], fields["head_dim"]
    heads = _whole(values, of_heads, file)
    kv_heads = heads if _value(values, of_kv_heads) is None else _whole(values, of_kv_heads, file)
    if heads % kv_heads:
        raise ConfigError(
            f"{file}: {of_kv_heads.key} is {kv_heads}, which does not divide {of_heads.key}={heads}; take both from "
            "the model's makers."
        )
    if _value(values, of_head_dim) is not None:
        head_dim = _whole(values, of_head_dim, file)
    elif hidden % heads:
        raise ConfigError(
            f"{file}: {of_heads.key} is {heads}, which does not divide {fields['hidden'].key}={hidden}, and there is "
            f"no {of_head_dim.key}; add it."
        )
    else:
        head_dim = hidden // heads
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
    for key, value in values.items():
        # True is 1 to Python
        if FOREIGN.search(key) and not (value is False or value in (None, [], {}) or _is_one(value)):
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


def _rope(values: Mapping[str, Any], of_theta: Field, file: Path) -> tuple[float, Llama3Rope | None]:
    """Base and scaling of the rotary embedding.

    transformers 5 keeps both in `rope_parameters`; older directories have `rope_theta` and `rope_scaling`,
    whose type was at first called `type`.
    """
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    source = rope if rope.get(of_theta.key) is not None else values
    theta = _positive(source, of_theta, file)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(
            f"{file}: partial_rotary_factor is {quoted(rope['partial_rotary_factor'])}, which is not supported; "
            "supported: 1.0."
        )
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ConfigError(f"{file}: rope type {quoted(kind)} is not supported; supported: default, llama3.")
    scaling = Llama3Rope(
        factor=_positive(rope, Field("factor"), file),
        low_freq_factor=_positive(rope, Field("low_freq_factor"), file),
        high_freq_factor=_positive(rope, Field("high_freq_factor"), file),
        original_max_position_embeddings=_whole(rope, Field("original_max_position_embeddings"), file),
    )
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise ConfigError(
            f"{file}: low_freq_factor is {scaling.low_freq_factor:g}; it must be below "
            f"high_freq_factor={scaling.high_freq_factor:g}."
        )
    return theta, scaling


def _refuse_two_ropes(values: Mapping[str, Any], file: Path) -> None:
    """Raises ConfigError where two places say two things of the rotary embedding: who reads takes the one or the
    other."""
    places = {name: values.get(name) or {} for name in ("rope_parameters", "rope_scaling")}
    said: dict[str, tuple[str, Any]] = {}
    for name, place in {"config.json itself": values, **places}.items():
        keys = ("rope_theta", "original_max_position_embeddings")
        found = {key: place.get(key) for key in keys}
        if place and place is not values:
            found["rope_type"] = place.get("rope_type") or place.get("type") or "default"
        for key, value in found.items():
            if value is None:
                continue
            where, first = said.setdefault(key, (name, value))
            if first != value:
                raise ConfigError(
                    f"{file}: {key} is {quoted(first)} in {where} and {quoted(value)} in {name}; keep the right one."
                )


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
