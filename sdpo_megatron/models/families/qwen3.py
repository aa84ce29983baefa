"""Qwen3: query and key pass through an RMSNorm per head. Qwen3-MoE: of each layer's feed-forward networks a token takes
some."""

from sdpo_megatron.models.families.base import EXPERT, Field, Only, Parameter, Rule
from sdpo_megatron.models.families.decoder import decoder

NORMS_PER_HEAD = (
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
)
EXPERTS = (
    Parameter(
        megatron="mlp.router.weight",
        rule=Rule.WHOLE,
        parts={"mlp.gate.weight": ("experts", "hidden")},
    ),
    Parameter(
        megatron=f"mlp.experts.local_experts.{EXPERT}.linear_fc1.weight",
        rule=Rule.GATED,
        parts={
            f"mlp.experts.{EXPERT}.gate_proj.weight": ("expert_ffn", "hidden"),
            f"mlp.experts.{EXPERT}.up_proj.weight": ("expert_ffn", "hidden"),
        },
        per_expert=True,
    ),
    Parameter(
        megatron=f"mlp.experts.local_experts.{EXPERT}.linear_fc2.weight",
        rule=Rule.ROWS,
        parts={f"mlp.experts.{EXPERT}.down_proj.weight": ("hidden", "expert_ffn")},
        per_expert=True,
    ),
)

QWEN3 = decoder(
    "Qwen3ForCausalLM",
    "qwen3",
    fields={"head_dim": Field("head_dim", default=128)},
    transformer={"qk_layernorm": True},
    attention=NORMS_PER_HEAD,
)
QWEN3_MOE = decoder(
    "Qwen3MoeForCausalLM",
    "qwen3_moe",
    fields={
        # transformers 5 writes the other
        "experts": Field("num_experts", also="num_local_experts"),
        "chosen_experts": Field("num_experts_per_tok"),
        "expert_ffn": Field("moe_intermediate_size"),
        "normalised": Field("norm_topk_prob", default=False),
    },
    only={
        "decoder_sparse_step": Only(1, "1"),
        "mlp_only_layers": Only([], "[]"),
    },
    transformer={"qk_layernorm": True},
    attention=NORMS_PER_HEAD,
    mlp=EXPERTS,
)
