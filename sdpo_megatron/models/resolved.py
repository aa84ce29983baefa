"""What transformers makes of a model directory, against what this package read of it: SGLang computes with the one, the
trainer with the other."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sdpo_megatron.errors import ConfigError, quoted
from sdpo_megatron.models.shape import ModelShape


def check_resolved(directory: Path, shape: ModelShape) -> None:
    """Raises ConfigError where transformers' own configuration of the model in `directory` says another thing than
    `shape`; whatever transformers raises for what it refuses. No code in the directory is run."""
    # takes seconds to import
    from transformers import AutoConfig

    file = directory / "config.json"
    config: Any = AutoConfig.from_pretrained(str(directory), trust_remote_code=False)
    theirs = _of_transformers(config)
    for key, own in _of_shape(shape).items():
        if theirs[key] != own:
            raise ConfigError(
                f"{file}: transformers, and with it SGLang, takes {quoted(theirs[key])} for {key}, and this trainer "
                f"{quoted(own)}: correct what config.json says of it, once and in one place."
            )


def _of_shape(shape: ModelShape) -> dict[str, Any]:
    scaling = None if shape.rope_scaling is None else asdict(shape.rope_scaling)
    return {
        "model_type": shape.family.model_type,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tie_embeddings,
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": shape.rms_norm_eps,
        "hidden_act": "silu",
        "rope_theta": shape.rope_theta,
        "rope_type": "default" if scaling is None else "llama3",
        **dict.fromkeys(LLAMA3, None),
        **(scaling or {}),
    }


LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
"""What a scaling of the type llama3 has."""


def _of_transformers(config: Any) -> dict[str, Any]:
    rope: Mapping[str, Any] = config.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain = {
        key: getattr(config, key)
        for key in (
            *("model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size"),
            *(
                "intermediate_size",
                "vocab_size",
                "tie_word_embeddings",
                "max_position_embeddings",
                "rms_norm_eps",
            ),
            "hidden_act",
        )
    }
    return {
        **plain,
        "head_dim": head_dim,
        "rope_theta": rope.get("rope_theta"),
        "rope_type": kind,
        **{key: rope.get(key) if kind == "llama3" else None for key in LLAMA3},
    }
