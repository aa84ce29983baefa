"""Qwen3: query and key pass through an RMSNorm per head. Qwen3-MoE: of each layer's feed-forward networks a token takes
some."""

from sdpo_megatron.models.families.base import EXPERT, Field, Only, Parameter, Rule
from sdpo_megatron.models.families.decoder import FIELDS, NORMS_PER_HEAD, ONLY, TRANSFORMER, Family

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
    ),
    Parameter(
        megatron=f"mlp.experts.local_experts.{EXPERT}.linear_fc2.weight",
        rule=Rule.ROWS,
        parts={f"mlp.experts.{EXPERT}.down_proj.weight": ("hidden", "expert_ffn")},
    ),
)

QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    fields={**FIELDS, "head_dim": Field("head_dim", default=128)},
    transformer={**TRANSFORMER, "qk_layernorm": True},
    attention=NORMS_PER_HEAD,
)
QWEN3_MOE = Family(
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    fields={
        **FIELDS,
        # transformers 5 writes the other
        "experts": Field("num_experts", also="num_local_experts"),
        "chosen_experts": Field("num_experts_per_tok"),
        "expert_ffn": Field("moe_intermediate_size"),
        "normalised": Field("norm_topk_prob", default=False),
    },
    only={
        **ONLY,
        "decoder_sparse_step": Only(1, "1"),
        "mlp_only_layers": Only([], "[]"),
    },
    transformer={**TRANSFORMER, "qk_layernorm": True},
    attention=NORMS_PER_HEAD,
    mlp=EXPERTS,
)
