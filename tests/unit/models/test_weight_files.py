import json
from pathlib import Path

import pytest

from sdpo_megatron.errors import ConfigError
from sdpo_megatron.models import weight_files as weight_files_module
from sdpo_megatron.models.families import FAMILIES
from sdpo_megatron.models.shape import ModelShape, read_model_shape
from sdpo_megatron.models.weight_files import check_weights, described, weight_files
from tests.families import UNSAID, named_tensors
from tests.sparse_weights import write_tensors, write_weights
from tests.unit.launch.launching import MODEL

WITH_HEADS = [name for name, family in FAMILIES.items() if "tie_word_embeddings" not in family.only]
"""What may have a head beside the embedding."""


def shape_of(directory: Path, **changes: object) -> ModelShape:
    (directory / "config.json").write_text(json.dumps(MODEL | changes))
    return read_model_shape(directory)


def refused(directory: Path, shape: ModelShape) -> str:
    with pytest.raises(ConfigError) as caught:
        check_weights(directory, shape)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("changes", [{}, {"head_dim": 48}], ids=["head size left unsaid", "head size given"])
@pytest.mark.parametrize(
    ("architecture", "tied"), [*((name, True) for name in FAMILIES), *((name, False) for name in WITH_HEADS)]
)
def test_described_is_what_transformers_builds(architecture: str, tied: bool, changes: dict, tmp_path: Path):
    import torch
    import transformers

    config_class = getattr(transformers, architecture).config_class
    if FAMILIES[architecture].norm_over_heads:
        changes = {}
    changes = UNSAID.get(architecture, {}) | changes
    changes = {"model_type": config_class.model_type, "tie_word_embeddings": tied} | changes
    shape = shape_of(tmp_path, architectures=[architecture], **changes)
    with torch.device("meta"):
        model = getattr(transformers, architecture)(config_class.from_pretrained(tmp_path))
    built = {name: list(tensor.shape) for name, tensor in named_tensors(model).items()}
    assert dict(described(shape)) == built


def test_files_of_the_index_or_the_single_one(tmp_path: Path):
    with pytest.raises(ConfigError) as caught:
        weight_files(tmp_path, "teacher.path")
    assert str(caught.value) == (
        f"teacher.path: {tmp_path} has no model.safetensors; download the model's weights as safetensors into it."
    )
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "consolidated.safetensors").touch()  # the same weights in another format, as some makers add
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]
    (tmp_path / "model.safetensors").unlink()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}))
    (tmp_path / "m-1.safetensors").touch()
    with pytest.raises(ConfigError, match=r" has no m-2\.safetensors; "):
        weight_files(tmp_path)
    (tmp_path / "m-2.safetensors").touch()
    assert weight_files(tmp_path) == [tmp_path / "m-1.safetensors", tmp_path / "m-2.safetensors"]


@pytest.mark.parametrize(
    "content",
    [
        '{"weight_map": {"a": "../b.safetensors"}}',
        "{}",
        "[]",
        "{",
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": []}}',
    ],
)
def test_a_damaged_index(content: str, tmp_path: Path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content)
    with pytest.raises(ConfigError) as caught:
        weight_files(tmp_path)
    assert str(caught.value) == f"{index} is damaged: it must hold a JSON object with 'weight_map'."


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_whole_weights(dtype: str, tmp_path: Path):
    shape = shape_of(tmp_path)
    write_weights(tmp_path, shape, dtype)
    check_weights(tmp_path, shape)


def test_in_several_files(tmp_path: Path):
    shape = shape_of(tmp_path)
    sizes = list(described(shape))
    write_tensors(tmp_path / "a.safetensors", dict(sizes[:7]))
    write_tensors(tmp_path / "b.safetensors", dict(sizes[7:]))
    index = {name: "a.safetensors" for name, _ in sizes[:7]} | {"x": "b.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    check_weights(tmp_path, shape)


def test_what_may_be_left(tmp_path: Path):
    shape = shape_of(tmp_path, tie_word_embeddings=True)
    left = {"lm_head.weight": [1026, 96], "model.layers.0.self_attn.rotary_emb.inv_freq": [8]}
    write_tensors(tmp_path / "model.safetensors", dict(described(shape)) | left)
    check_weights(tmp_path, shape)


@pytest.mark.parametrize("family", WITH_HEADS)
def test_a_head_of_its_own_under_a_tied_flag(family: str, tmp_path: Path):
    """transformers computes with such a head, SGLang drops it; copies of the embedding are common, and stay."""
    import torch
    import transformers
    from safetensors.torch import save_file

    config_class = getattr(transformers, family).config_class
    own = {"architectures": [family], "model_type": config_class.model_type, **UNSAID.get(family, {})}
    shape = shape_of(tmp_path, **own, tie_word_embeddings=True)
    weights = {name: torch.randn(size) for name, size in described(shape)}
    embedding = weights["model.embed_tokens.weight"]
    save_file(weights | {"lm_head.weight": embedding.clone()}, tmp_path / "model.safetensors")
    check_weights(tmp_path, shape)
    weights["lm_head.weight"] = embedding.clone()
    weights["lm_head.weight"][-1, -1] += 1
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert refused(tmp_path, shape) == (
        f"model.path: {tmp_path} holds a lm_head.weight that differs from model.embed_tokens.weight, but its "
        "config.json says tie_word_embeddings: true, with which it would be dropped; write false there."
    )
    model = getattr(transformers, family).from_pretrained(tmp_path)
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    check_weights(tmp_path, shape_of(tmp_path, **own, tie_word_embeddings=False))


def test_a_head_of_its_own_where_there_can_be_none(tmp_path: Path):
    shape = shape_of(tmp_path, architectures=["Gemma3ForCausalLM"], model_type="gemma3_text")
    write_tensors(tmp_path / "model.safetensors", dict(described(shape)) | {"lm_head.weight": [1026, 96]})
    check_weights(tmp_path, shape)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert refused(tmp_path, shape).endswith(
        "with which it would be dropped; models of gemma3_text with a head of their own are not supported."
    )


@pytest.mark.parametrize("at_once", [1 << 24, 1000])
def test_tied_copies_in_two_files_are_compared_to_their_ends(
    at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(weight_files_module, "READ_AT_ONCE", at_once)
    shape = shape_of(tmp_path, tie_word_embeddings=True)
    write_weights(tmp_path, shape)
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    head = tmp_path / "b.safetensors"
    index = {"weight_map": {"x": "a.safetensors", "lm_head.weight": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    write_tensors(head, {"lm_head.weight": [1026, 96]})
    check_weights(tmp_path, shape)
    with head.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert "a lm_head.weight that differs" in refused(tmp_path, shape)
    write_tensors(head, {"lm_head.weight": [1026, 96]}, "BF16")
    assert "a lm_head.weight that differs" in refused(tmp_path, shape)


NORM = "model.layers.3.input_layernorm.weight"
MISTAKES = [
    (
        {"num_hidden_layers": 3},
        {},
        "the weights of 4 layers, but config.json says num_hidden_layers 3; make them",
    ),
    (
        {"num_hidden_layers": 10**9},
        {},
        "the weights of 4 layers, but config.json says num_hidden_layers 1000000000",
    ),
    (
        {"vocab_size": 1000},
        {},
        "has the shape [1026, 96], but config.json describes [1000, 96]; take both from",
    ),
    (
        {"vocab_size": 2000},
        {},
        "has the shape [1026, 96], but config.json describes [2000, 96]; take both from",
    ),
    (
        {"intermediate_size": 100},
        {},
        "has the shape [192, 96], but config.json describes [100, 96]; take both",
    ),
    ({}, {NORM: None}, f"has no tensor {NORM}, which a LlamaForCausalLM needs; download it again."),
    (
        {},
        {NORM: [95]},
        f"{NORM} in DIR has the shape [95], but config.json describes [96]; take both from the",
    ),
    (
        {},
        {"model.layers.3.self_attn.q_proj.bias": [96]},
        "DIR holds model.layers.3.self_attn.q_proj.bias, which a LlamaForCausalLM with this config.json does not",
    ),
]


@pytest.mark.parametrize("config, tensors, message", MISTAKES)
def test_weights_of_another_model(tmp_path: Path, config: dict, tensors: dict, message: str):
    sizes = dict(described(shape_of(tmp_path))) | tensors
    write_tensors(tmp_path / "model.safetensors", {name: size for name, size in sizes.items() if size})
    assert message.replace("DIR", str(tmp_path)) in refused(tmp_path, shape_of(tmp_path, **config))


def test_weights_that_are_quantised(tmp_path: Path):
    shape = shape_of(tmp_path)
    write_weights(tmp_path, shape, "F8_E4M3")
    assert " is of type F8_E4M3, which is not supported; supported: F64, F32, F16, BF16." in refused(
        tmp_path, shape
    )


@pytest.mark.parametrize("size", [0, 7, 500, -1])
def test_a_file_cut_short(size: int, tmp_path: Path):
    shape, file = shape_of(tmp_path), tmp_path / "model.safetensors"
    write_weights(tmp_path, shape)
    with file.open("r+b") as opened:
        opened.truncate(size if size >= 0 else file.stat().st_size - 1)
    message = refused(tmp_path, shape)
    assert message.startswith(f"{file} is damaged or cut short (") and message.endswith(
        "); download it again."
    )
