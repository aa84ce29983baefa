"""What transformers makes of a model directory, against what this package read of it: SGLang computes with the one, the
trainer with the other."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from sdpo_megatron.errors import ConfigError, quoted
from sdpo_megatron.models.families.decoder import FIELDS
from sdpo_megatron.models.rope import KINDS, RopeScaling
from sdpo_megatron.models.shape import ModelShape


def check_resolved(directory: Path, shape: ModelShape) -> None:
    """Raises ConfigError where transformers' own configuration of the model in `directory` says another thing than
    `shape`; whatever transformers raises for what it refuses. No code in the directory is run."""
    # takes seconds to import
    from transformers import AutoConfig

    file = directory / "config.json"
    config: Any = AutoConfig.from_pretrained(str(directory), trust_remote_code=False)
    theirs, ours = _of_transformers(config), _of_shape(shape)
    for key in ours | theirs:
        said, own = theirs.get(key), ours.get(key)
        if said != own:
            raise ConfigError(
                f"{file}: transformers, and with it SGLang, takes {quoted(said)} for {key}, and this trainer "
                f"{quoted(own)}: correct what config.json says of it, once and in one place."
            )
    if config.pad_token_id is not None and config.pad_token_id >= shape.vocab:
        raise ConfigError(
            f"{file}: pad_token_id is {config.pad_token_id}, and the vocabulary has {shape.vocab} tokens, so that "
            "transformers cannot load the model; correct it, or remove it."
        )


def _of_shape(shape: ModelShape) -> dict[str, Any]:
    found = {
        **{field.key: getattr(shape, attribute) for attribute, field in FIELDS.items()},
        "model_type": shape.family.model_type,
        "activation": shape.family.activation,
        "query_pre_attn_scalar": shape.query_pre_attn_scalar,
        **_rope_of_shape(shape.rope_theta, shape.rope_scaling),
    }
    if shape.experts is not None:
        found |= {
            "num_experts": shape.experts.count,
            "num_experts_per_tok": shape.experts.chosen,
            "moe_intermediate_size": shape.experts.ffn,
            "norm_topk_prob": shape.experts.normalised,
        }
    if shape.sliding is not None:
        kinds = ["full_attention"] * shape.layers
        for layer in shape.sliding.layers:
            kinds[layer] = "sliding_attention"
        plain = _rope_of_shape(shape.sliding_rope_theta or shape.rope_theta, None)
        found |= {"layer_types": kinds, "sliding_window": shape.sliding.window}
        found |= {f"{key} of sliding layers": value for key, value in plain.items()}
    return found


def _rope_of_shape(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    settings = {} if scaling is None else {"rope_type": scaling.rope_type, **asdict(scaling)}
    return {"rope_theta": theta, "rope_type": "default", **dict.fromkeys(SCALED), **settings}


SCALED = tuple({field.name: None for kind in KINDS.values() for field in fields(kind)})
"""What a scaling has, of whatever type."""


def _of_transformers(config: Any) -> dict[str, Any]:
    of_experts = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
    names = ("model_type", *(field.key for field in FIELDS.values()), *of_experts, "query_pre_attn_scalar")
    found = {key: getattr(config, key, None) for key in names}
    found["head_dim"] = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    found["activation"] = getattr(config, "hidden_activation", None) or config.hidden_act
    ropes = config.rope_parameters or {}
    found |= _rope_of_transformers(ropes.get("full_attention", ropes))
    if "sliding_attention" in (getattr(config, "layer_types", None) or []):
        found |= {"layer_types": config.layer_types, "sliding_window": config.sliding_window}
        plain = _rope_of_transformers(ropes.get("sliding_attention", ropes))
        found |= {f"{key} of sliding layers": value for key, value in plain.items()}
    return found


def _rope_of_transformers(rope: Mapping[str, Any]) -> dict[str, Any]:
    kind = rope.get("rope_type", "default")
    known = KINDS.get(kind)
    own = () if known is None else tuple(field.name for field in fields(known))
    # as transformers' function of it does
    unsaid = {"beta_fast": 32.0, "beta_slow": 1.0}
    return {
        "rope_theta": rope.get("rope_theta"),
        "rope_type": kind,
        **dict.fromkeys(SCALED),
        **{key: rope.get(key) or unsaid.get(key) for key in own},
    }
