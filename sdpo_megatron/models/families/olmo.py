"""OLMo 2 and 3: norms behind attention and feed-forward network, queries and keys normed over all heads together.

In OLMo 3 three layers of four see a sliding window, with a plain rotary embedding; the scaled one is the others'.
"""

from sdpo_megatron.models.families.base import Field, Only
from sdpo_megatron.models.families.decoder import FIELDS, NORMS_OVER_HEADS, ONLY_WINDOWED, Family

EPSILON = Field("rms_norm_eps", default=1e-5)

OLMO2 = Family(
    architecture="Olmo2ForCausalLM",
    model_type="olmo2",
    fields={**FIELDS, "rms_norm_eps": EPSILON},
    attention=NORMS_OVER_HEADS,
    norms="after",
    norm_over_heads=True,
)
OLMO3 = Family(
    architecture="Olmo3ForCausalLM",
    model_type="olmo3",
    fields={
        **FIELDS,
        "rms_norm_eps": EPSILON,
        # transformers and SGLang take different ones where there is none
        "rope_theta": Field("rope_theta"),
        "sliding_window": Field("sliding_window", default=4096),
    },
    only={
        **ONLY_WINDOWED,
        "rope_parameters": Only(
            None, "rope_theta and rope_scaling, which are all that SGLang reads of it here"
        ),
    },
    attention=NORMS_OVER_HEADS,
    norms="after",
    norm_over_heads=True,
    window="of some layers",
)
