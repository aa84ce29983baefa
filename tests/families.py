"""The registered families, by what transformers calls them: a new one takes part in every test that walks this."""

import json
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor

from sdpo_megatron.models.families import FAMILIES

MODEL_TYPES = [getattr(transformers, architecture).config_class.model_type for architecture in FAMILIES]

YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
}
"""In so short a context some frequencies of 16 or 32 dimensions stay, some are divided, some are between."""
BESIDE_SIZES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "qwen3_moe": {
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
        "norm_topk_prob": True,
    },
    "olmo3": {
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "rope_scaling": YARN,
        "rope_theta": 500_000.0,
    },
    "gemma3_text": {
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        },
        "query_pre_attn_scalar": 24,
    },
}
"""What a tiny model of four layers says beyond its sizes, so that what its family has shows."""


UNSAID: dict[str, dict[str, Any]] = {
    "Olmo3ForCausalLM": {"rope_theta": 500_000.0},
    "Qwen3MoeForCausalLM": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40},
}
"""What config.json of an architecture must say that others may leave unsaid."""


def named_tensors(network: Any) -> dict[str, Tensor]:
    """Returns name -> parameter of a transformers model, as its files have them: transformers 5 joins the experts of a
    layer, whose parts are views here."""
    found: dict[str, Tensor] = {}
    for name, tensor in network.named_parameters():
        found |= apart(name, tensor)
    return found


def apart(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Returns the parts of a parameter of a transformers model, or of its gradient, under the names of files."""
    at, _, joined = name.rpartition("mlp.experts.")
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(joined, ())
    if not at or not parts:
        return {name: tensor}
    return {
        f"{at}mlp.experts.{expert}.{part}.weight": piece
        for expert, own in enumerate(tensor)
        for part, piece in zip(parts, own.chunk(len(parts)), strict=True)
    }


def save_tiny(network: Any, directory: Path) -> Path:
    """Writes a transformers model. OLMo 3's config.json is as its makers write it, not as transformers 5 does."""
    network.save_pretrained(directory)
    file = directory / "config.json"
    values = json.loads(file.read_text())
    if values["model_type"] == "olmo3":
        ropes = values.pop("rope_parameters")
        values["rope_theta"] = ropes["full_attention"].pop("rope_theta")
        values["rope_scaling"] = ropes["full_attention"]
        file.write_text(json.dumps(values, indent=2))
    return directory
