"""The registered families, by what transformers calls them: a new one takes part in every test that walks this."""

import json
from pathlib import Path
from typing import Any

import transformers

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
    "olmo3": {
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "rope_scaling": YARN,
        "rope_theta": 500_000.0,
    },
}
"""What a tiny model of four layers says beyond its sizes, so that what its family has shows."""


UNSAID: dict[str, dict[str, Any]] = {"Olmo3ForCausalLM": {"rope_theta": 500_000.0}}
"""What config.json of an architecture must say that others may leave unsaid."""


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
