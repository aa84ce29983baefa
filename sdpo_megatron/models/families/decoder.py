"""What the families share: a decoder with rotary attention, RMSNorms and a gated feed-forward network.

A family's own file says what it has beyond that, and with which values it differs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from sdpo_megatron.models.families.base import EXPERT, Dimension, Field, Only, Parameter, Rule

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
    "hidden_act": Only("silu", "'silu'"),
    "is_causal": Only(True, "true"),
    "use_sliding_window": Only(False, "false"),
    "layer_types": Only("full_attention", "'full_attention' in every layer"),
    "quantization_config": Only(None, "unquantised weights"),
    "partial_rotary_factor": Only(1.0, "1.0"),
}

ONLY_WINDOWED = {key: only for key, only in ONLY.items() if key != "layer_types"}
"""Those of a family with windows of some layers."""
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


def norms_of_queries_and_keys(rule: Rule, queries: Dimension, keys: Dimension) -> tuple[Parameter, ...]:
    """Returns the RMSNorms that queries and keys pass through, of these sizes."""
    sizes: dict[str, Dimension] = {"q": queries, "k": keys}
    return tuple(
        Parameter(
            megatron=f"self_attention.{one}_layernorm.weight",
            rule=rule,
            parts={f"self_attn.{one}_norm.weight": (size,)},
        )
        for one, size in sizes.items()
    )


NORMS_PER_HEAD = norms_of_queries_and_keys(Rule.WHOLE, "head_dim", "head_dim")
NORMS_OVER_HEADS = norms_of_queries_and_keys(Rule.HEADS, "queries", "keys")


@dataclass(frozen=True, kw_only=True)
class Family:
    """All that is told of the models of one architecture."""

    architecture: str
    """The architecture's name in config.json."""
    model_type: str
    """What config.json calls the family."""
    fields: Mapping[str, Field] = field(default_factory=lambda: FIELDS)
    """Attribute of ModelShape -> where config.json has it."""
    only: Mapping[str, Only] = field(default_factory=lambda: ONLY)
    """Key of config.json -> what it must say."""
    transformer: Mapping[str, Any] = field(default_factory=lambda: TRANSFORMER)
    """Arguments of megatron's TransformerConfig that all models of the family share."""
    activation: Literal["silu", "gelu_pytorch_tanh"] = "silu"
    """What the feed-forward network's gate passes through."""
    norms: Literal["before", "after", "around"] = "before"
    """Whether a layer's attention and feed-forward network have their RMSNorms before them, after them and before the
    sum, or both."""
    scaled_embedding: bool = False
    """Whether a token's embedding is multiplied with the root of its size, rounded to the model's type."""
    norm_over_heads: bool = False
    """Whether queries, and keys, pass through one RMSNorm over all heads together. TransformerConfig's `qk_layernorm`
    is another one, of each head alone."""
    window: Literal["none", "of some layers", "not served"] = "none"
    """What the field `sliding_window`, if there is one, means: a window of the layers that `layer_types` names, or one
    of all layers, which SGLang does not compute."""
    full_every: int = 4
    """Where windows are of some layers and `layer_types` does not say which, each layer of so many has none."""
    served_whole: bool = False
    """Whether each rank of a server holds the whole embedding, without padding."""
    attention: tuple[Parameter, ...] = ()
    """Those of a layer's attention beside its projections' weights."""
    mlp: tuple[Parameter, ...] = MLP
    """Those of a layer's feed-forward network."""
    embedding: ClassVar[Parameter] = EMBEDDING
    final_norm: ClassVar[Parameter] = FINAL_NORM
    head: ClassVar[Parameter] = HEAD
    """The LM head; where it is tied, Hugging Face has the embedding alone."""

    @property
    def layer(self) -> tuple[Parameter, ...]:
        """Those of a layer, in the order of the network."""
        projections = (QKV, *self.attention, ATTENTION_OUTPUT)
        if self.norms == "before":
            return (INPUT_NORM, *projections, MLP_NORM, *self.mlp)
        if self.norms == "after":
            return (*projections, NORM_AFTER_ATTENTION, *self.mlp, NORM_AFTER_MLP)
        before_mlp = replace(MLP_NORM, parts={"pre_feedforward_layernorm.weight": ("hidden",)})
        return (INPUT_NORM, *projections, NORM_AFTER_ATTENTION, before_mlp, *self.mlp, NORM_AFTER_MLP)

    def of_layer(self, layer: int, experts: int) -> Iterator[Parameter]:
        """Yields the parameters of layer `layer`, counted from 0, which has so many `experts`."""
        for parameter in self.layer:
            of_all = map(parameter.of_expert, range(experts)) if EXPERT in parameter.megatron else [parameter]
            for one in of_all:
                yield one.of_layer(layer)

    def parameters(self, layers: int, *, tied: bool, experts: int = 0) -> Iterator[Parameter]:
        """Yields all parameters of a model of `layers` layers, under whole Hugging Face names, in the order of the
        network."""
        yield self.embedding
        for layer in range(layers):
            yield from self.of_layer(layer, experts)
        yield self.final_norm
        if not tied:
            yield self.head
