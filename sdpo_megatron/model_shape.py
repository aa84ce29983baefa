"""What the trainer must know of a Hugging Face model to build it: `config.json`, read with `json` alone.

Anything in a `config.json` that this project would compute wrongly is refused here, by name.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdpo_megatron.errors import ConfigError, shown


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
    architectures = values.get("architectures") or ["none"]
    if architectures[0] not in FAMILIES:
        raise ConfigError(
            f"{file}: architecture {architectures[0]} is not supported; supported: {', '.join(FAMILIES)}."
        )
    _refuse_unsupported(values, file)
    family = FAMILIES[architectures[0]]
    heads, hidden = _number(values, "num_attention_heads", file), _number(values, "hidden_size", file)
    theta, scaling = _rope(values, file)
    return ModelShape(
        architecture=architectures[0],
        layers=_number(values, "num_hidden_layers", file),
        heads=heads,
        kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or hidden // heads,
        hidden=hidden,
        ffn=_number(values, "intermediate_size", file),
        vocab=_number(values, "vocab_size", file),
        tie_embeddings=values.get("tie_word_embeddings", False),
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=values.get("rms_norm_eps", 1e-6),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        max_positions=_number(values, "max_position_embeddings", file),
        eos_ids=_eos_ids(values, directory),
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must hold a JSON object.")
    return values


KINDS: dict[str, tuple[str, tuple[type, ...]]] = {
    "architectures": ("list", (list,)),
    "layer_types": ("list", (list,)),
    "num_key_value_heads": ("whole number", (int,)),
    "head_dim": ("whole number", (int,)),
    "rms_norm_eps": ("number", (int, float)),
    "rope_theta": ("number", (int, float)),
    "rope_parameters": ("JSON object", (dict,)),
    "rope_scaling": ("JSON object", (dict,)),
    "tie_word_embeddings": ("boolean", (bool,)),
    "eos_token_id": ("whole number or a list of them", (int, list)),
}
"""Of the keys that may be missing or null."""


def _check_kinds(values: Mapping[str, Any], file: Path) -> None:
    for key, (name, kinds) in KINDS.items():
        value = values.get(key)
        if value is not None and not isinstance(value, kinds):
            raise ConfigError(f"{file}: {key} is {shown(value)}; it must be a {name}.")


def _number(values: Mapping[str, Any], key: str, file: Path) -> int:
    value = values.get(key)
    if not isinstance(value, int) or value <= 0:
        raise ConfigError(f"{file}: {key} is {shown(value)}; it must be a positive whole number.")
    return value


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
                f"{file}: {key} is {shown(values[key])}, which is not supported; supported: {supported}."
            )


def _rope(values: Mapping[str, Any], file: Path) -> tuple[float, Llama3Rope | None]:
    """Base and scaling of the rotary embedding.

    transformers 5 keeps both in `rope_parameters`; older directories have `rope_theta` and `rope_scaling`,
    whose type was at first called `type`.
    """
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or values.get("rope_theta") or 10_000.0
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(
            f"{file}: partial_rotary_factor is {rope['partial_rotary_factor']}, which is not supported; "
            "supported: 1.0."
        )
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise ConfigError(f"{file}: rope type '{kind}' is not supported; supported: default, llama3.")
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [key for key in keys if not isinstance(rope.get(key), int | float)]
    if missing:
        raise ConfigError(f"{file}: rope type 'llama3' needs the number {missing[0]}, which is missing.")
    return float(theta), Llama3Rope(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
    )


def _eos_ids(values: Mapping[str, Any], directory: Path) -> tuple[int, ...]:
    file = directory / "generation_config.json"
    sources = [values, _read_json(file)] if file.is_file() else [values]
    ids: list[int] = []
    for source in sources:
        _check_kinds(source, file)
        eos = source.get("eos_token_id")
        ids += eos if isinstance(eos, list) else [] if eos is None else [eos]
    wrong = [token_id for token_id in ids if not isinstance(token_id, int) or isinstance(token_id, bool)]
    if wrong:
        raise ConfigError(f"{directory}: eos_token_id holds {shown(wrong[0])}; it must be token ids.")
    return tuple(dict.fromkeys(ids))
