"""What the trainer must know of a Hugging Face model to build it: `config.json`, read with `json` alone.

Anything in a `config.json` that this project would compute wrongly is refused here, by name.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdpo_megatron.errors import ConfigError, quoted


@dataclass(frozen=True, kw_only=True)
class Family:
    """What an architecture's `config.json` leaves unsaid."""

    qkv_bias: bool
    """Linear layers of q, k and v have a bias."""
    qk_norm: bool
    """q and k pass through an RMSNorm per head."""


FAMILIES = {
    "LlamaForCausalLM": Family(qkv_bias=False, qk_norm=False),
    "Qwen2ForCausalLM": Family(qkv_bias=True, qk_norm=False),
    "Qwen3ForCausalLM": Family(qkv_bias=False, qk_norm=True),
}


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
    """The LM head is the embedding matrix."""
    rope_theta: float
    rope_scaling: Llama3Rope | None
    rms_norm_eps: float
    qkv_bias: bool
    qk_norm: bool
    max_positions: int
    """Longest context that the model was made for, in tokens."""
    eos_ids: tuple[int, ...]
    """Tokens that end a response, those of generation_config.json included."""


def read_model_shape(directory: Path, key: str = "model.path") -> ModelShape:
    """Read `directory`/config.json; `key` is the setting that named it.

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
    _refuse_unsupported(values, file)
    hidden, vocab = _whole(values, "hidden_size", file), _whole(values, "vocab_size", file)
    heads, kv_heads, head_dim = _heads(values, hidden, file)
    theta, scaling = _rope(values, file)
    return ModelShape(
        architecture=architecture,
        layers=_whole(values, "num_hidden_layers", file),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        hidden=hidden,
        ffn=_whole(values, "intermediate_size", file),
        vocab=vocab,
        tie_embeddings=bool(values.get("tie_word_embeddings")),
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=_positive(values, "rms_norm_eps", file, default=1e-6),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        max_positions=_whole(values, "max_position_embeddings", file),
        eos_ids=_eos_ids(values, directory, vocab),
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must hold a JSON object.")
    return values


KINDS: dict[str, tuple[str, type]] = {
    "architectures": ("list", list),
    "layer_types": ("list", list),
    "rope_parameters": ("JSON object", dict),
    "rope_scaling": ("JSON object", dict),
    "tie_word_embeddings": ("boolean", bool),
}
"""Of the keys that may be missing or null."""


def _check_kinds(values: Mapping[str, Any], file: Path) -> None:
    for key, (name, kind) in KINDS.items():
        value = values.get(key)
        if value is not None and not isinstance(value, kind):
            raise ConfigError(f"{file}: {key} is {quoted(value)}; it must be a {name}.")


def _whole(values: Mapping[str, Any], key: str, file: Path, default: int | None = None) -> int:
    """`default` is for a key that is missing or null; None where it must be there."""
    value = default if values.get(key) is None else values[key]
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ConfigError(f"{file}: {key} is {quoted(value)}; it must be a positive whole number.")
    return value


def _positive(values: Mapping[str, Any], key: str, file: Path, default: float | None = None) -> float:
    value = default if values.get(key) is None else values[key]
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ConfigError(f"{file}: {key} is {quoted(value)}; it must be a positive number.")
    return float(value)


def _heads(values: Mapping[str, Any], hidden: int, file: Path) -> tuple[int, int, int]:
    """Attention heads, key-value heads, and the size of each."""
    heads = _whole(values, "num_attention_heads", file)
    kv_heads = _whole(values, "num_key_value_heads", file, default=heads)
    if heads % kv_heads:
        raise ConfigError(
            f"{file}: num_key_value_heads is {kv_heads}, which does not divide num_attention_heads={heads}; take "
            "both from the model's makers."
        )
    if values.get("head_dim") is None and hidden % heads:
        raise ConfigError(
            f"{file}: num_attention_heads is {heads}, which does not divide hidden_size={hidden}, and there is no "
            "head_dim; add it."
        )
    head_dim = _whole(values, "head_dim", file, default=hidden // heads)
    if head_dim % 2:
        raise ConfigError(f"{file}: a head has {head_dim} dimensions; rotary embeddings need an even number.")
    return heads, kv_heads, head_dim


def _refuse_unsupported(values: Mapping[str, Any], file: Path) -> None:
    """Each entry is (key, is it a setting that would be computed wrongly, what is supported)."""
    layer_types = {str(layer_type) for layer_type in values.get("layer_types") or []}
    refused = [
        ("attention_bias", bool(values.get("attention_bias")), "false"),
        ("mlp_bias", bool(values.get("mlp_bias")), "false"),
        ("hidden_act", values.get("hidden_act", "silu") != "silu", "'silu'"),
        ("use_sliding_window", bool(values.get("use_sliding_window")), "false"),
        ("layer_types", not layer_types <= {"full_attention"}, "'full_attention' in every layer"),
        ("quantization_config", bool(values.get("quantization_config")), "unquantised weights"),
        ("partial_rotary_factor", values.get("partial_rotary_factor", 1.0) != 1.0, "1.0"),
        ("pretraining_tp", values.get("pretraining_tp", 1) != 1, "1"),
    ]
    for key, is_refused, supported in refused:
        if is_refused:
            raise ConfigError(
                f"{file}: {key} is {quoted(values[key])}, which is not supported; supported: {supported}."
            )


def _rope(values: Mapping[str, Any], file: Path) -> tuple[float, Llama3Rope | None]:
    """Base and scaling of the rotary embedding.

    transformers 5 keeps both in `rope_parameters`; older directories have `rope_theta` and `rope_scaling`,
    whose type was at first called `type`.
    """
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    source = rope if rope.get("rope_theta") is not None else values
    theta = _positive(source, "rope_theta", file, default=10_000.0)
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
        factor=_positive(rope, "factor", file),
        low_freq_factor=_positive(rope, "low_freq_factor", file),
        high_freq_factor=_positive(rope, "high_freq_factor", file),
        original_max_position_embeddings=_whole(rope, "original_max_position_embeddings", file),
    )
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise ConfigError(
            f"{file}: low_freq_factor is {scaling.low_freq_factor:g}; it must be below "
            f"high_freq_factor={scaling.high_freq_factor:g}."
        )
    return theta, scaling


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
