"""Qwen2 and Qwen2.5: query, key and value have biases."""

from sdpo_megatron.models.families.base import Parameter, Rule
from sdpo_megatron.models.families.decoder import TRANSFORMER, Family

QWEN2 = Family(
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    transformer={**TRANSFORMER, "add_qkv_bias": True},
    attention=(
        Parameter(
            megatron="self_attention.linear_qkv.bias",
            rule=Rule.QKV,
            parts={
                "self_attn.q_proj.bias": ("queries",),
                "self_attn.k_proj.bias": ("keys",),
                "self_attn.v_proj.bias": ("keys",),
            },
        ),
    ),
)
