"""Llama 2 and 3, and models made in their form, such as SmolLM2."""

from sdpo_megatron.models.families.base import Only
from sdpo_megatron.models.families.decoder import ONLY, Family

LLAMA = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    only={**ONLY, "mlp_bias": Only(False, "false"), "pretraining_tp": Only(1, "1")},
)
