import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdpo_megatron.errors import ConfigError
from sdpo_megatron.models.families import FAMILIES
from sdpo_megatron.models.rope import LinearRope, Llama3Rope, YarnRope
from sdpo_megatron.models.shape import FOREIGN, Experts, Sliding, read_model_shape

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

YARN_ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
MISTRAL = {"architectures": ["MistralForCausalLM"]}
OLMO3 = {"architectures": ["Olmo3ForCausalLM"]}


def shape_of(directory: Path, **changes):
    (directory / "config.json").write_text(json.dumps(LLAMA | changes))
    return read_model_shape(directory)


def test_a_llama_directory(tmp_path: Path):
    shape = shape_of(tmp_path)
    assert (shape.layers, shape.heads, shape.kv_heads, shape.head_dim) == (30, 9, 3, 64)
    assert (shape.hidden, shape.ffn, shape.vocab, shape.max_positions) == (576, 1536, 49152, 8192)
    assert (shape.rope_theta, shape.rope_scaling, shape.rms_norm_eps) == (100000.0, None, 1e-5)
    assert shape.tie_embeddings
    assert shape.eos_ids == (2,)


def test_what_other_families_say_and_leave_unsaid(tmp_path: Path):
    shape_of(tmp_path, architectures=["Qwen2ForCausalLM"], use_sliding_window=False, sliding_window=4096)
    qwen3 = shape_of(tmp_path, architectures=["Qwen3ForCausalLM"], attention_bias=False)
    assert qwen3.head_dim == 128


def test_windows(tmp_path: Path):
    """OLMo 3 has them in the layers that it names, and else in three of four; a Mistral's must never cut."""
    unsaid = shape_of(tmp_path, **OLMO3).sliding
    assert unsaid == Sliding(window=4096, layers=tuple(n for n in range(30) if n % 4 != 3))
    kinds = [*29 * ["full_attention"], "sliding_attention"]
    assert shape_of(tmp_path, **OLMO3, layer_types=kinds, sliding_window=7).sliding == Sliding(
        window=7, layers=(29,)
    )
    assert (
        shape_of(tmp_path, **OLMO3, layer_types=30 * ["full_attention"], sliding_window=None).sliding is None
    )
    for said in ({"sliding_window": None}, {"sliding_window": 8192}, {"max_position_embeddings": 4096}):
        assert shape_of(tmp_path, **MISTRAL, **said).sliding is None


def test_null_and_full_attention_in_every_layer_are_taken(tmp_path: Path):
    shape_of(tmp_path, layer_types=["full_attention"] * 30, quantization_config=None, attention_bias=None)
    shape_of(tmp_path, layer_types=None)


def test_defaults(tmp_path: Path):
    shape = shape_of(tmp_path, num_key_value_heads=None, rope_theta=None, head_dim=None)
    assert (shape.kv_heads, shape.rope_theta, shape.head_dim) == (9, 10000.0, 64)


def test_rope_of_transformers_5_and_before(tmp_path: Path):
    new = shape_of(tmp_path, rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert (new.rope_theta, new.rope_scaling) == (5e5, None)
    expected = Llama3Rope(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    new = shape_of(tmp_path, rope_theta=None, rope_parameters=LLAMA3_ROPE | {"rope_theta": 5e5})
    assert new.rope_scaling == expected
    old = shape_of(tmp_path, rope_scaling=LLAMA3_ROPE, rope_theta=5e5)
    assert (old.rope_theta, old.rope_scaling) == (5e5, expected)
    linear = {"type": "linear", "factor": 4.0}
    assert shape_of(tmp_path, rope_scaling=linear).rope_scaling == LinearRope(factor=4.0)
    yarn = YarnRope(factor=4.0, original_max_position_embeddings=2048, beta_fast=32.0, beta_slow=1.0)
    assert shape_of(tmp_path, rope_scaling=YARN_ROPE | {"type": "yarn"}).rope_scaling == yarn
    said = {"attention_factor": 1.1386294361119891, "beta_fast": 16, "truncate": True}
    assert shape_of(tmp_path, rope_scaling=YARN_ROPE | said).rope_scaling == replace(yarn, beta_fast=16.0)


def test_eos_ids_of_both_files(tmp_path: Path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2]}))
    assert shape_of(tmp_path).eos_ids == (2, 7)


def test_a_directory_that_transformers_saved(tmp_path: Path):
    from transformers import Qwen3Config

    Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ).save_pretrained(tmp_path)
    shape = read_model_shape(tmp_path)
    assert (shape.hidden, shape.kv_heads, shape.head_dim, shape.rope_theta) == (64, 2, 16, 1e6)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "architecture GPT2LMHeadModel is not supported; "
            "supported: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM, "
            "Olmo2ForCausalLM, Olmo3ForCausalLM, Gemma3ForCausalLM.",
        ),
        ({"architectures": None}, "architecture none is not supported; supported: "),
        ({"attention_bias": True}, "attention_bias is True, which is not supported; supported: false."),
        ({"mlp_bias": True}, "mlp_bias is True, which is not supported; supported: false."),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', which is not supported; supported: 'silu'."),
        (
            {"use_sliding_window": True},
            "use_sliding_window is True, which is not supported; supported: false.",
        ),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types is ['full_attention', 'sliding",
        ),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}, which is not supported"),
        (
            {"rope_scaling": {"type": "linear", "factor": 0.5}},
            "factor is 0.5; it must be 1 or more in a rope of type 'linear'.",
        ),
        (
            {"is_causal": False},
            "is_causal is False, which is not supported; supported: true.",
        ),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 4}},
            "rope type 'dynamic' is not supported; supported: default, linear, llama3, yarn.",
        ),
        ({"rope_scaling": {"rope_type": "llama3"}}, "factor is None; it must be a positive number."),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5, which is not supported",
        ),
        ({"hidden_size": None}, "hidden_size is None; it must be a positive whole number."),
        ({"num_key_value_heads": "3"}, "num_key_value_heads is '3'; it must be a positive whole number."),
        ({"num_key_value_heads": -3}, "num_key_value_heads is -3; it must be a positive whole number."),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0; it must be a positive whole number."),
        (
            {"num_key_value_heads": 2},
            "num_key_value_heads is 2, which does not divide num_attention_heads=9;",
        ),
        ({"num_attention_heads": True}, "num_attention_heads is True; it must be a positive whole number."),
        ({"head_dim": 63}, "a head has 63 dimensions; rotary embeddings need an even number."),
        ({"head_dim": -64}, "head_dim is -64; it must be a positive whole number."),
        ({"head_dim": True}, "head_dim is True; it must be a positive whole number."),
        (
            {"hidden_size": 577},
            "num_attention_heads is 9, which does not divide hidden_size=577, and there is no",
        ),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0; it must be a positive number."),
        ({"rms_norm_eps": "x"}, "rms_norm_eps is 'x'; it must be a positive number."),
        ({"rope_theta": -1.0}, "rope_theta is -1.0; it must be a positive number."),
        ({"rope_theta": float("nan")}, "rope_theta is nan; it must be a positive number."),
        ({"rope_theta": float("inf")}, "rope_theta is inf; it must be a positive number."),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta is 'x'; it must be a positive number."),
        ({"rope_parameters": {"rope_theta": [1]}}, "rope_theta is [1]; it must be a positive number."),
        (
            {"rope_parameters": {"rope_type": ["x"]}},
            "rope type ['x'] is not supported; supported: default, linear, llama3, yarn.",
        ),
        ({"rope_scaling": LLAMA3_ROPE | {"factor": 0}}, "factor is 0; it must be a positive number."),
        ({"rope_scaling": LLAMA3_ROPE | {"factor": "8"}}, "factor is '8'; it must be a positive number."),
        (
            {"rope_scaling": LLAMA3_ROPE | {"original_max_position_embeddings": 1.5}},
            "original_max_position_embeddings is 1.5; it must be a positive whole number.",
        ),
        (
            {"rope_scaling": LLAMA3_ROPE | {"low_freq_factor": 4.0}},
            "low_freq_factor is 4; it must be below high_freq_factor=4.",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0; it must be a positive number."),
        ({"rope_scaling": YARN_ROPE | {"factor": None}}, "factor is None; it must be a positive number."),
        (
            {"rope_scaling": YARN_ROPE | {"factor": 0.5}},
            "factor is 0.5; it must be 1 or more in a rope of type",
        ),
        (
            {"rope_scaling": YARN_ROPE | {"original_max_position_embeddings": None}},
            "original_max_position_embeddings is None; it must be a positive whole number.",
        ),
        ({"rope_scaling": YARN_ROPE | {"beta_slow": 32}}, "beta_slow is 32; it must be below beta_fast=32."),
        (
            {"rope_scaling": YARN_ROPE | {"attention_factor": 1.0}},
            "attention_factor is 1, but SGLang computes with ln(factor) / 10 + 1 = 1.13863; other values are not",
        ),
        (
            {"rope_scaling": YARN_ROPE | {"mscale": 0.7}},
            "mscale is 0.7 in a rope of type 'yarn', which is not supported; remove it where the model needs none.",
        ),
        (
            {"rope_scaling": YARN_ROPE | {"attn_factor": 2}},
            "attn_factor is 2 in a rope of type 'yarn', which",
        ),
        (
            {"rope_scaling": YARN_ROPE | {"truncate": False}},
            "truncate is False, which is not supported; supp",
        ),
        (
            MISTRAL,
            "sliding_window is 4096 where it is missing, which SGLang does not compute; write null if the model needs "
            "none, or set max_position_embeddings to 4096: up to there it makes no difference.",
        ),
        (
            MISTRAL | {"sliding_window": 100},
            "sliding_window is 100, which SGLang does not compute; write null",
        ),
        (MISTRAL | {"sliding_window": "x"}, "sliding_window is 'x'; it must be a positive whole number."),
        (
            MISTRAL | {"attention_bias": True},
            "attention_bias is True, which is not supported; supported: false.",
        ),
        (OLMO3 | {"sliding_window": None}, "sliding_window is None; it must be a positive whole number."),
        (OLMO3 | {"rope_theta": None}, "rope_theta is None; it must be a positive number."),
        (
            OLMO3 | {"rope_theta": None, "rope_scaling": YARN_ROPE | {"rope_theta": 5e5}},
            "rope_theta is None; it must be a positive number.",
        ),
        (
            OLMO3 | {"head_dim": 32},
            "head_dim is 32, but SGLang takes hidden_size / num_attention_heads = 64 in",
        ),
        (
            OLMO3 | {"clip_qkv": 8.0},
            "clip_qkv is 8.0, which models of olmo3 do not have and would be left out;",
        ),
        (
            OLMO3 | {"attention_bias": True},
            "attention_bias is True, which is not supported; supported: false.",
        ),
        (
            OLMO3 | {"layer_types": ["full_attention"]},
            "layer_types is ['full_attention']; it must be one of sliding_attention and full_attention for each of 30 "
            "layers.",
        ),
        (OLMO3 | {"layer_types": 30 * ["linear_attention"]}, "layer_types is ['linear_attention', "),
        (
            OLMO3 | {"rope_parameters": {"full_attention": {"rope_theta": 5e5}}},
            "rope_parameters is {'full_attention': {'rope_theta': 500000.0}}, which is not supported; supported: "
            "rope_theta and rope_scaling, which are all that SGLang reads of it here.",
        ),
        (
            {"query_pre_attn_scalar": 256},
            "query_pre_attn_scalar is 256, which models of llama do not have and would be left out;",
        ),
        ({"architectures": [["x"]]}, "architecture ['x'] is not supported; supported: "),
        ({"architectures": "x"}, "architectures is 'x'; it must be a list."),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; it must be a boolean."),
        ({"rope_scaling": [1]}, "rope_scaling is [1]; it must be a JSON object."),
        ({"eos_token_id": "</s>"}, "eos_token_id holds '</s>'; it must be token ids from 0 to 49151."),
        (
            {"hidden_act": "g" * 1000},
            f"hidden_act is '{'g' * 76}..., which is not supported; supported: 'silu'.",
        ),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(tmp_path: Path, changes: dict, message: str):
    with pytest.raises(ConfigError) as caught:
        shape_of(tmp_path, **changes)
    assert str(caught.value).startswith(f"{tmp_path}/config.json: {message}")


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_refused_field_of_every_family_has_its_line(tmp_path: Path, architecture: str):
    """Those of the family's table, and those that only models of others have."""
    wrong = {"layer_types": ["x"], "rope_parameters": {"x": 1}, "tie_word_embeddings": False}
    lines = {
        key: f"is {wrong.get(key, 'x')!r}, which is not supported; supported: {only.shown}."
        for key, only in FAMILIES[architecture].only.items()
    }
    for part in FOREIGN.pattern.replace("?", "").split("|"):
        lines[f"a_{part}_b"] = "is 'x', which models of "
    assert len(lines) >= 20
    for key, line in lines.items():
        with pytest.raises(ConfigError) as caught:
            shape_of(tmp_path, architectures=[architecture], **{key: wrong.get(key, "x")})
        assert str(caught.value).startswith(f"{tmp_path}/config.json: {key} {line}")


@pytest.mark.parametrize(
    "architecture",
    ["Qwen2MoeForCausalLM", "Gemma3ForConditionalGeneration", "Olmo3ForSequenceClassification"],
)
def test_other_architectures_are_named(tmp_path: Path, architecture: str):
    with pytest.raises(ConfigError, match=f"architecture {architecture} is not supported; supported: Llama"):
        shape_of(tmp_path, architectures=[architecture])


MOE: dict[str, Any] = {
    **{"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 8},
    **{"num_experts_per_tok": 2, "moe_intermediate_size": 40},
}


def test_experts_under_either_name(tmp_path: Path):
    experts = Experts(count=8, chosen=2, ffn=40, normalised=False)
    assert shape_of(tmp_path, **MOE).experts == experts
    saved = MOE | {"num_experts": None, "num_local_experts": 8, "norm_topk_prob": True}
    assert shape_of(tmp_path, **saved).experts == replace(experts, normalised=True)
    assert shape_of(tmp_path).experts is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": None}, "num_experts is None; it must be a positive whole number."),
        ({"num_local_experts": 9}, "num_experts is 8, and num_local_experts 9, which is another name of it; keep"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9; it must be from 2 to num_experts=8."),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok is 1; it must be from 2 to num_experts=8."),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size is 0; it must be a positive whole number."),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1; it must be a boolean."),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2, which is not supported; supported: 1."),
        ({"mlp_only_layers": [0]}, "mlp_only_layers is [0], which is not supported; supported: []."),
        ({"shared_expert_intermediate_size": 40}, "shared_expert_intermediate_size is 40, which models of qwen3_moe"),
    ],
)  # fmt: skip
def test_experts_that_are_refused(tmp_path: Path, changes: dict, message: str):
    with pytest.raises(ConfigError) as caught:
        shape_of(tmp_path, **MOE | changes)
    assert str(caught.value).startswith(f"{tmp_path}/config.json: {message}")


@pytest.mark.parametrize("wrong", [["</s>"], [2, 1.5], [True], [-1], [49152]])
def test_end_tokens_that_are_no_ids(tmp_path: Path, wrong: list):
    with pytest.raises(ConfigError, match="eos_token_id holds .*; it must be token ids"):
        shape_of(tmp_path, eos_token_id=wrong)


def test_what_is_no_model_directory(tmp_path: Path):
    with pytest.raises(
        ConfigError, match=r"^model.path: there is no directory .*none; give a Hugging Face model dir"
    ):
        read_model_shape(tmp_path / "none")
    with pytest.raises(
        ConfigError, match=r"^model.path: .* has no config.json; give a Hugging Face model directory"
    ):
        read_model_shape(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="config.json is not valid JSON: "):
        read_model_shape(tmp_path)
