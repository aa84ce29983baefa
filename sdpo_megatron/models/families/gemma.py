"""Gemma 3, text alone: norms on both sides of attention and feed-forward network, all of weight 1 + w.

Five layers of six see a sliding window, with a rotary embedding of a base of their own, which is never scaled. In
bfloat16 SGLang 0.5.23 does not round the embedding's factor, as the models' makers and transformers do: it is up to two
thousandths larger or smaller there.
"""

from sdpo_megatron.models.families.base import Field, Only
from sdpo_megatron.models.families.decoder import FIELDS, NORMS_PER_HEAD, ONLY_WINDOWED, TRANSFORMER, Family

FULL_EVERY = 6
PATTERN = Only(FULL_EVERY, f"{FULL_EVERY}, or layer_types, which says it layer by layer")
GELU = Only("gelu_pytorch_tanh", "'gelu_pytorch_tanh'")
NO_CAP = Only(None, "null")

GEMMA3 = Family(
    architecture="Gemma3ForCausalLM",
    model_type="gemma3_text",
    fields={
        **FIELDS,
        "kv_heads": Field("num_key_value_heads", default=4),
        "head_dim": Field("head_dim", default=256),
        "query_pre_attn_scalar": Field("query_pre_attn_scalar", default=256.0),
        "rope_theta": Field("rope_theta", default=1_000_000.0),
        "sliding_rope_theta": Field("rope_local_base_freq", default=10_000.0),
        "sliding_window": Field("sliding_window", default=4096),
        "tie_embeddings": Field("tie_word_embeddings", default=True),
    },
    only={
        **ONLY_WINDOWED,
        "hidden_act": GELU,
        "hidden_activation": GELU,
        "attn_logit_softcapping": NO_CAP,
        "final_logit_softcapping": NO_CAP,
        "use_bidirectional_attention": Only(False, "false"),
        "sliding_window_pattern": PATTERN,
        # transformers writes it and does not read it
        "_sliding_window_pattern": PATTERN,
        # SGLang loads no other head
        "tie_word_embeddings": Only(True, "true"),
    },
    transformer={**TRANSFORMER, "qk_layernorm": True, "layernorm_zero_centered_gamma": True},
    attention=NORMS_PER_HEAD,
    activation="gelu_pytorch_tanh",
    norms="around",
    scaled_embedding=True,
    window="of some layers",
    full_every=FULL_EVERY,
    served_whole=True,
)
