"""Qwen3: query and key pass through an RMSNorm per head."""

from sdpo_megatron.models.families.base import Field, Parameter, Rule
from sdpo_megatron.models.families.decoder import decoder

QWEN3 = decoder(
    "Qwen3ForCausalLM",
    fields={"head_dim": Field("head_dim", default=128)},
    transformer={"qk_layernorm": True},
    attention=(
        Parameter(
            megatron="self_attention.q_layernorm.weight",
            rule=Rule.WHOLE,
            parts={"self_attn.q_norm.weight": ("head_dim",)},
        ),
        Parameter(
            megatron="self_attention.k_layernorm.weight",
            rule=Rule.WHOLE,
            parts={"self_attn.k_norm.weight": ("head_dim",)},
        ),
    ),
)
