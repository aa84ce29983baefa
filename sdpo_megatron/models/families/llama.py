"""Llama 2 and 3, and models made in their form, such as SmolLM2."""

from sdpo_megatron.models.families.base import Only
from sdpo_megatron.models.families.decoder import decoder

LLAMA = decoder(
    "LlamaForCausalLM",
    "llama",
    only={"mlp_bias": Only(False, "false"), "pretraining_tp": Only(1, "1")},
)
