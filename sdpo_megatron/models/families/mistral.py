"""Mistral: Llama's layers; what says nothing of a sliding window has one."""

from sdpo_megatron.models.families.base import Field, Only
from sdpo_megatron.models.families.decoder import FIELDS, ONLY, Family

MISTRAL = Family(
    architecture="MistralForCausalLM",
    model_type="mistral",
    fields={**FIELDS, "sliding_window": Field("sliding_window", default=4096)},
    # SGLang serves it as a Llama, which reads this key
    only={**ONLY, "mlp_bias": Only(False, "false")},
    window="not served",
)
