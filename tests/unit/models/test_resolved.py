"""A model that transformers, and with it the server, reads otherwise than the trainer is refused by name."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdpo_megatron.errors import ConfigError, ReportedError
from sdpo_megatron.models.families import FAMILIES
from sdpo_megatron.models.resolved import check_resolved
from sdpo_megatron.models.rope import YarnRope
from sdpo_megatron.models.shape import Sliding, read_model_shape
from sdpo_megatron.models.weight_files import check_weights, weight_files
from tests.families import UNSAID
from tests.unit.launch.launching import MODEL, write_model

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 128}
DEFAULT = {"rope_type": "default", "rope_theta": 5e5}


def write(directory: Path, **changes: Any) -> Path:
    (directory / "config.json").write_text(json.dumps(MODEL | changes))
    return directory


def refused(directory: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        check_resolved(directory, read_model_shape(directory))
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{directory}/", "")


ROPES = (
    {},
    {"rope_parameters": DEFAULT},
    {"rope_theta": 7e5, "rope_scaling": LLAMA3},
    {"rope_theta": 7e5, "rope_scaling": YARN},
    {"rope_theta": 7e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
)
OLMO3_ROPES = (
    {"rope_theta": 5e5},
    {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    {
        "rope_theta": 5e5,
        "rope_scaling": YARN | {"attention_factor": 0.1 * math.log(8.0) + 1.0},
        "sliding_window": 7,
    },
    {"rope_theta": 5e5, "layer_types": ["full_attention", *3 * ["sliding_attention"]], "rope_scaling": None},
    {"rope_theta": 5e5, "layer_types": 4 * ["full_attention"], "sliding_window": None},
)


GEMMA3_ROPES = (
    {},
    {"rope_theta": 7e5, "rope_local_base_freq": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    {"rope_theta": 7e5, "rope_scaling": LLAMA3, "sliding_window_pattern": 6, "_sliding_window_pattern": 6},
    {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 7e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        },
        "layer_types": ["full_attention", *3 * ["sliding_attention"]],
        "sliding_window": 7,
    },
    {
        "rope_parameters": {"full_attention": YARN, "sliding_attention": {}},
        "rope_theta": 7e5,
        "rope_local_base_freq": 2e4,
        "query_pre_attn_scalar": 16,
    },
)
ROPES_OF = {"Olmo3ForCausalLM": OLMO3_ROPES, "Gemma3ForCausalLM": GEMMA3_ROPES}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_family_is_read_alike(tmp_path: Path, architecture: str):
    family = FAMILIES[architecture]
    more = {"head_dim": 32, "tie_word_embeddings": True, "num_key_value_heads": 6, "rms_norm_eps": 1e-4}
    if family.norm_over_heads:
        more["head_dim"] = 16
    for rope in ROPES_OF.get(architecture, ROPES):
        for others in ({}, more):
            said = UNSAID.get(architecture, {}) | rope | others
            write(tmp_path, architectures=[architecture], model_type=family.model_type, **said)
            check_resolved(tmp_path, read_model_shape(tmp_path))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"rope_parameters": DEFAULT, "rope_scaling": LLAMA3},
            "config.json: rope_type is 'default' in rope_parameters and 'llama3' in rope_scaling; keep the right one.",
        ),
        (
            {"rope_parameters": DEFAULT, "rope_theta": 1e4},
            "config.json: rope_theta is 10000.0 in config.json itself and 500000.0 in rope_parameters; keep the right "
            "one.",
        ),
        (
            {"rope_scaling": LLAMA3, "original_max_position_embeddings": 256},
            "config.json: original_max_position_embeddings is 256 in config.json itself and 512 in rope_scaling; keep "
            "the right one.",
        ),
        (
            {"model_type": "qwen3"},
            "config.json: model_type is 'qwen3', but architecture LlamaForCausalLM is of llama; take config.json from "
            "the model's makers.",
        ),
        (
            {"auto_map": {"AutoModelForCausalLM": "modeling.Own"}},
            "config.json: auto_map names code of the model's own, which is not run here; where the model is computed "
            "as every llama, remove it.",
        ),
        (
            {"final_logit_softcapping": 30.0},
            "config.json: final_logit_softcapping is 30.0, which models of llama do not have and would be left out; "
            "remove it where the model needs none.",
        ),
        (
            {"residual_multiplier": 0.22},
            "config.json: residual_multiplier is 0.22, which models of llama do not",
        ),
        ({"logits_scaling": 16}, "config.json: logits_scaling is 16, which models of llama do not have"),
        ({"logit_scale": 0.0625}, "config.json: logit_scale is 0.0625, which models of llama do not have"),
        (
            {"no_rope_layers": [1, 0]},
            "config.json: no_rope_layers is [1, 0], which models of llama do not have",
        ),
        (
            {"use_parallel_residual": True},
            "config.json: use_parallel_residual is True, which models of llama",
        ),
    ],
)
def test_what_config_json_alone_shows(tmp_path: Path, changes: dict[str, Any], line: str):
    assert refused(write(tmp_path, **changes)).startswith(line)


def test_what_transformers_could_not_load(tmp_path: Path):
    assert refused(write(tmp_path, pad_token_id=1026)) == (
        "config.json: pad_token_id is 1026, and the vocabulary has 1026 tokens, so that transformers cannot load the "
        "model; correct it, or remove it."
    )
    check_resolved(write(tmp_path, pad_token_id=1025), read_model_shape(tmp_path))
    check_resolved(write(tmp_path, pad_token_id=-1), read_model_shape(tmp_path))
    # of a llama transformers computes it
    check_resolved(write(tmp_path, head_dim=None), read_model_shape(tmp_path))
    qwen2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "head_dim": None}
    assert refused(write(tmp_path, **qwen2)).startswith(
        "config.json: transformers, and with it SGLang, takes None for head_dim, and this trainer 16: "
    )


def test_experts_of_a_model_that_has_none(tmp_path: Path):
    check_resolved(write(tmp_path, num_experts=None), read_model_shape(tmp_path))
    assert "takes 4 for num_experts, and this trainer None: " in refused(write(tmp_path, num_experts=4))


def test_neutral_values_of_other_families_are_taken(tmp_path: Path):
    write(
        tmp_path,
        final_logit_softcapping=None,
        residual_multiplier=1.0,
        logit_scale=1,
        use_parallel_residual=False,
    )
    check_resolved(tmp_path, read_model_shape(tmp_path))


@pytest.mark.parametrize(
    ("ours", "line"),
    [
        ({"rope_theta": 5.0}, "takes 10000.0 for rope_theta, and this trainer 5.0: "),
        ({"head_dim": 8}, "takes 16 for head_dim, and this trainer 8: "),
        ({"rms_norm_eps": 1e-5}, "takes 1e-06 for rms_norm_eps, and this trainer 1e-05: "),
        ({"tie_embeddings": True}, "takes False for tie_word_embeddings, and this trainer True: "),
        (
            {"sliding": Sliding(window=7, layers=(1,))},
            "takes None for layer_types, and this trainer \\['full_",
        ),
    ],
)
def test_whatever_else_differs(tmp_path: Path, ours: dict[str, Any], line: str):
    shape = replace(read_model_shape(write(tmp_path)), **ours)
    with pytest.raises(ConfigError, match=line):
        check_resolved(tmp_path, shape)


OLMO3 = {
    "architectures": ["Olmo3ForCausalLM"],
    "model_type": "olmo3",
    "rope_theta": 5e5,
    "rope_scaling": YARN,
    "sliding_window": 7,
}


@pytest.mark.parametrize(
    ("changes", "ours", "line"),
    [
        # transformers 5.23 takes 500000 for these layers whatever the file says, SGLang what it says
        (
            {"rope_theta": 1e4},
            {},
            "takes 500000.0 for rope_theta of sliding layers, and this trainer 10000.0: ",
        ),
        (
            {},
            {"sliding": Sliding(window=8, layers=(0, 1, 2))},
            "takes 7 for sliding_window, and this trainer 8: ",
        ),
        ({}, {"sliding": Sliding(window=7, layers=(0, 1))}, "for layer_types, and this trainer "),
        ({}, {"sliding": None}, "for layer_types, and this trainer None: "),
        ({}, {"rope_scaling": None}, "takes 'yarn' for rope_type, and this trainer 'default': "),
        (
            {"rope_scaling": YARN | {"beta_fast": 16}},
            {
                "rope_scaling": YarnRope(
                    factor=8.0, original_max_position_embeddings=128, beta_fast=32, beta_slow=1
                )
            },
            "takes 16 for beta_fast, and this trainer 32: ",
        ),
    ],
)
def test_whatever_differs_by_layer(tmp_path: Path, changes: dict[str, Any], ours: dict[str, Any], line: str):
    shape = replace(read_model_shape(write(tmp_path, **(OLMO3 | changes))), **ours)
    with pytest.raises(ConfigError, match=line):
        check_resolved(tmp_path, shape)


GEMMA3 = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}
LINEAR = {"rope_type": "linear", "factor": 8.0}


@pytest.mark.parametrize(
    ("changes", "ours", "line"),
    [
        ({}, {"query_pre_attn_scalar": 16.0}, "takes 256 for query_pre_attn_scalar, and this trainer 16.0: "),
        (
            {"rope_local_base_freq": 2e4},
            {"sliding_rope_theta": 1e4},
            "takes 20000.0 for rope_theta of sliding layers, and this trainer 10000.0: ",
        ),
        # transformers finds the name of before beside its own default, which it takes
        (
            {"rope_scaling": {"type": "linear", "factor": 8.0}},
            {},
            "takes 'default' for rope_type, and this trainer 'linear': ",
        ),
        (
            {
                "rope_parameters": {"full_attention": LINEAR, "sliding_attention": {}},
                "rope_scaling": LINEAR | {"factor": 4.0},
            },
            {},
            "takes 4.0 for factor, and this trainer 8.0: ",
        ),
    ],
)
def test_whatever_differs_of_a_gemma(
    tmp_path: Path, changes: dict[str, Any], ours: dict[str, Any], line: str
):
    shape = replace(read_model_shape(write(tmp_path, **(GEMMA3 | changes))), **ours)
    with pytest.raises(ConfigError, match=line):
        check_resolved(tmp_path, shape)


def test_what_transformers_alone_refuses(tmp_path: Path):
    values = {key: value for key, value in MODEL.items() if key != "model_type"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(Exception, match="model_type") as caught:
        check_resolved(tmp_path, read_model_shape(tmp_path))
    # the boundary makes a line of it
    assert not isinstance(caught.value, ReportedError)


def test_one_file_beside_an_index_of_others(tmp_path: Path):
    model = write_model(tmp_path / "model")
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    assert weight_files(model) == [model / "model.safetensors"]
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    with pytest.raises(ConfigError) as caught:
        weight_files(model)
    assert str(caught.value) == (
        f"model.path: {model} has both model.safetensors and model.safetensors.index.json of other files, which may be "
        "other weights; remove one of them."
    )
    (model / "model.safetensors").unlink()
    (model / "model-00001-of-00001.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:1\n"
    )
    with pytest.raises(ConfigError, match="is a pointer of git-lfs, not the file itself; run: git lfs pull."):
        check_weights(model, read_model_shape(model))
