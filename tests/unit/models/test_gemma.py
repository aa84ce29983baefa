"""What is read of a Gemma 3's config.json, and what is refused of it."""

import json
from pathlib import Path

import pytest

from sdpo_megatron.errors import ConfigError
from sdpo_megatron.models.rope import LinearRope
from sdpo_megatron.models.shape import ModelShape, Sliding, read_model_shape

GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "eos_token_id": [1, 106],
}
LINEAR_ROPE = {"rope_type": "linear", "factor": 8.0}


def shape_of(directory: Path, **changes) -> ModelShape:
    (directory / "config.json").write_text(json.dumps(GEMMA3 | changes))
    return read_model_shape(directory)


def test_a_gemma_directory(tmp_path: Path):
    """As released before transformers 5, as transformers 5 saves it, and what a missing key means."""
    said = {"head_dim": 32, "query_pre_attn_scalar": 168, "sliding_window": 512, "sliding_window_pattern": 6}
    old = {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": LINEAR_ROPE}
    shape = shape_of(tmp_path, **said, **old)
    assert (shape.head_dim, shape.attention_scale) == (32, 168**-0.5)
    assert shape.sliding == Sliding(window=512, layers=tuple(n for n in range(30) if n % 6 != 5))
    assert (shape.rope_theta, shape.sliding_rope_theta) == (5e5, 2e4)
    assert shape.rope_scaling == LinearRope(factor=8.0)
    sliding, full = {"rope_type": "default", "rope_theta": 2e4}, LINEAR_ROPE | {"rope_theta": 5e5}
    new = {"rope_theta": None, "rope_parameters": {"sliding_attention": sliding, "full_attention": full}}
    assert shape_of(tmp_path, **said, **new) == shape
    without = {"rope_parameters": {"sliding_attention": {}, "full_attention": LINEAR_ROPE}}
    assert shape_of(tmp_path, **said, **(old | without | {"rope_scaling": None})) == shape
    unsaid = {"rope_theta": None, "tie_word_embeddings": None, "num_key_value_heads": None}
    shape = shape_of(tmp_path, **unsaid, num_attention_heads=8)
    assert (shape.head_dim, shape.attention_scale, shape.kv_heads) == (256, 1 / 16, 4)
    assert (shape.rope_theta, shape.sliding_rope_theta, shape.rope_scaling) == (1e6, 1e4, None)
    assert shape.tie_embeddings and shape.sliding is not None and shape.sliding.window == 4096


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"query_pre_attn_scalar": 0},
            "query_pre_attn_scalar is 0; it must be a positive number.",
        ),
        # neutral in other keys of that kind
        (
            {"final_logit_softcapping": 1.0},
            "final_logit_softcapping is 1.0, which is not supported; supported: null.",
        ),
        (
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention is True, which is not supported; supported: false.",
        ),
        (
            {"hidden_activation": "gelu"},
            "hidden_activation is 'gelu', which is not supported; supported: 'gelu_pytorch_tanh'.",
        ),
        (
            {"tie_word_embeddings": False},
            "tie_word_embeddings is False, which is not supported; supported: true.",
        ),
        (
            {"sliding_window_pattern": 4},
            "sliding_window_pattern is 4, which is not supported; supported: 6, or layer_types, which says it layer by "
            "layer.",
        ),
        (
            {"_sliding_window_pattern": 4},
            "_sliding_window_pattern is 4, which is not supported; supported: 6, or layer_types, which says it",
        ),
        (
            {"rope_parameters": {"full_attention": {}}},
            "rope_parameters is {'full_attention': {}}; it must hold a JSON object for each of sliding_attention and",
        ),
        (
            {"rope_parameters": {"sliding_attention": {}, "full_attention": {}, "linear_attention": {}}},
            "rope_parameters is {'sliding_attention': {}, 'full_attention': {}, 'linear_attention': {}}; it must hold",
        ),
        (
            {"rope_local_base_freq": -1.0},
            "rope_local_base_freq is -1.0; it must be a positive number.",
        ),
        (
            {"rope_parameters": LINEAR_ROPE},
            "rope_parameters is {'rope_type': 'linear', 'factor': 8.0}; it must hold a JSON object for each of "
            "sliding_attention and full_attention.",
        ),
        (
            {"rope_parameters": {"sliding_attention": None, "full_attention": {}}},
            "rope_parameters is {'sliding_attention': None, 'full_attention': {}}; it must hold a JSON object for",
        ),
        (
            {"rope_parameters": {"sliding_attention": LINEAR_ROPE, "full_attention": {}}},
            "rope type 'linear' of layers with a window is not supported; supported: default.",
        ),
        (
            {"rope_parameters": {"sliding_attention": {"rope_theta": 2e4}, "full_attention": {}}}
            | {"rope_local_base_freq": 1e4},
            "rope_local_base_freq is 10000.0 in config.json itself and 20000.0 in rope_parameters; keep the right one.",
        ),
        (
            {"rope_parameters": {"sliding_attention": {}, "full_attention": {"rope_theta": 1e6}}},
            "rope_theta is 100000.0 in config.json itself and 1000000.0 in rope_parameters; keep the right one.",
        ),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(tmp_path: Path, changes: dict, message: str):
    with pytest.raises(ConfigError) as caught:
        shape_of(tmp_path, **changes)
    assert str(caught.value).startswith(f"{tmp_path}/config.json: {message}")
