"""What the families share: a decoder with rotary attention, RMSNorms and a gated feed-forward network.

A family's own file says what it has beyond that, and with which values it differs.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from sdpo_megatron.models.families.base import Family, Field, Only, Parameter, Rule

FIELDS = {
    "layers": Field("num_hidden_layers"),
    "heads": Field("num_attention_heads"),
    "kv_heads": Field("num_key_value_heads"),
    "head_dim": Field("head_dim"),
    "hidden": Field("hidden_size"),
    "ffn": Field("intermediate_size"),
    "vocab": Field("vocab_size"),
    "max_positions": Field("max_position_embeddings"),
    "tie_embeddings": Field("tie_word_embeddings", default=False),
    "rope_theta": Field("rope_theta", default=10_000.0),
    "rms_norm_eps": Field("rms_norm_eps", default=1e-6),
}

ONLY = {
    "attention_bias": Only(False, "false"),
    "is_causal": Only(True, "true"),
    "use_sliding_window": Only(False, "false"),
    "layer_types": Only("full_attention", "'full_attention' in every layer"),
    "quantization_config": Only(None, "unquantised weights"),
    "partial_rotary_factor": Only(1.0, "1.0"),
}

TRANSFORMER = {"gated_linear_unit": True, "add_bias_linear": False}

EMBEDDING = Parameter(
    megatron="embedding.word_embeddings.weight",
    rule=Rule.VOCABULARY,
    parts={"model.embed_tokens.weight": ("vocab", "hidden")},
)
INPUT_NORM = Parameter(
    megatron="input_layernorm.weight",
    fused="self_attention.linear_qkv.layer_norm_weight",
    rule=Rule.WHOLE,
    parts={"input_layernorm.weight": ("hidden",)},
)
QKV = Parameter(
    megatron="self_attention.linear_qkv.weight",
    rule=Rule.QKV,
    parts={
        "self_attn.q_proj.weight": ("queries", "hidden"),
        "self_attn.k_proj.weight": ("keys", "hidden"),
        "self_attn.v_proj.weight": ("keys", "hidden"),
    },
)
ATTENTION_OUTPUT = Parameter(
    megatron="self_attention.linear_proj.weight",
    rule=Rule.ROWS,
    parts={"self_attn.o_proj.weight": ("hidden", "queries")},
)
MLP_NORM = Parameter(
    megatron="pre_mlp_layernorm.weight",
    fused="mlp.linear_fc1.layer_norm_weight",
    rule=Rule.WHOLE,
    parts={"post_attention_layernorm.weight": ("hidden",)},
)
MLP = (
    Parameter(
        megatron="mlp.linear_fc1.weight",
        rule=Rule.GATED,
        parts={"mlp.gate_proj.weight": ("ffn", "hidden"), "mlp.up_proj.weight": ("ffn", "hidden")},
    ),
    Parameter(
        megatron="mlp.linear_fc2.weight",
        rule=Rule.ROWS,
        parts={"mlp.down_proj.weight": ("hidden", "ffn")},
    ),
)
NORM_AFTER_ATTENTION = Parameter(
    megatron="self_attn_bda.norm.weight",
    rule=Rule.WHOLE,
    parts={"post_attention_layernorm.weight": ("hidden",)},
)
NORM_AFTER_MLP = Parameter(
    megatron="mlp_bda.norm.weight",
    rule=Rule.WHOLE,
    parts={"post_feedforward_layernorm.weight": ("hidden",)},
)
FINAL_NORM = Parameter(
    megatron="decoder.final_layernorm.weight",
    rule=Rule.WHOLE,
    parts={"model.norm.weight": ("hidden",)},
)
HEAD = Parameter(
    megatron="output_layer.weight",
    rule=Rule.VOCABULARY,
    parts={"lm_head.weight": ("vocab", "hidden")},
)
NOTHING: Mapping[str, Any] = {}


def decoder(
    architecture: str,
    model_type: str,
    *,
    fields: Mapping[str, Field] = NOTHING,
    only: Mapping[str, Only | None] = NOTHING,
    transformer: Mapping[str, Any] = NOTHING,
    attention: tuple[Parameter, ...] = (),
    activation: Literal["silu", "gelu_pytorch_tanh"] = "silu",
    norms: Literal["before", "after", "around"] = "before",
    scaled_embedding: bool = False,
    norm_over_heads: bool = False,
    window: Literal["none", "of some layers", "not served"] = "none",
    full_every: int = 4,
    served_whole: bool = False,
    mlp: tuple[Parameter, ...] = MLP,
) -> Family:
    """Returns a family of such decoders. The mappings add to the shared ones or replace entries of them, None in `only`
    removes one; `attention` are parameters of a layer's attention beside its projections' weights, `mlp` those of its
    feed-forward network."""
    projections = (QKV, *attention, ATTENTION_OUTPUT)
    layer = (INPUT_NORM, *projections, MLP_NORM, *mlp)
    if norms == "after":
        layer = (*projections, NORM_AFTER_ATTENTION, *mlp, NORM_AFTER_MLP)
    if norms == "around":
        before_mlp = replace(MLP_NORM, parts={"pre_feedforward_layernorm.weight": ("hidden",)})
        layer = (INPUT_NORM, *projections, NORM_AFTER_ATTENTION, before_mlp, *mlp, NORM_AFTER_MLP)
    only = {**ONLY, "hidden_act": Only(activation, f"'{activation}'"), **only}
    return Family(
        architecture=architecture,
        model_type=model_type,
        fields={**FIELDS, **fields},
        only={key: value for key, value in only.items() if value is not None},
        transformer={**TRANSFORMER, **transformer},
        activation=activation,
        norms=norms,
        scaled_embedding=scaled_embedding,
        norm_over_heads=norm_over_heads,
        window=window,
        full_every=full_every,
        served_whole=served_whole,
        embedding=EMBEDDING,
        layer=layer,
        final_norm=FINAL_NORM,
        head=HEAD,
    )
