"""OLMo 2 and 3: norms behind attention and feed-forward network, queries and keys normed over all heads together.

In OLMo 3 three layers of four see a sliding window, with a plain rotary embedding; the scaled one is the others'.
"""

from sdpo_megatron.models.families.base import Field, Only, Parameter, Rule
from sdpo_megatron.models.families.decoder import decoder

NORMS_OVER_HEADS = (
    Parameter(
        megatron="self_attention.q_layernorm.weight",
        rule=Rule.HEADS,
        parts={"self_attn.q_norm.weight": ("queries",)},
    ),
    Parameter(
        megatron="self_attention.k_layernorm.weight",
        rule=Rule.HEADS,
        parts={"self_attn.k_norm.weight": ("keys",)},
    ),
)
EPSILON = Field("rms_norm_eps", default=1e-5)

OLMO2 = decoder(
    "Olmo2ForCausalLM",
    "olmo2",
    fields={"rms_norm_eps": EPSILON},
    attention=NORMS_OVER_HEADS,
    norms="after",
    norm_over_heads=True,
)
OLMO3 = decoder(
    "Olmo3ForCausalLM",
    "olmo3",
    fields={
        "rms_norm_eps": EPSILON,
        # transformers and SGLang take different ones where there is none
        "rope_theta": Field("rope_theta"),
        "sliding_window": Field("sliding_window", default=4096),
    },
    only={
        "layer_types": None,
        "rope_parameters": Only(
            None, "rope_theta and rope_scaling, which are all that SGLang reads of it here"
        ),
    },
    attention=NORMS_OVER_HEADS,
    norms="after",
    norm_over_heads=True,
    window="of some layers",
)
