"""Directories whose weights are torch's pickles."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdpo_megatron.errors import ConfigError
from sdpo_megatron.models.pretrained import resolve_model_path, with_safetensors
from sdpo_megatron.models.shape import read_model_shape
from sdpo_megatron.models.weight_files import check_weights, described, weight_files
from tests.unit.launch.launching import MODEL

CACHE = "cache"


def random_weights(directory: Path, **changes: object) -> dict[str, torch.Tensor]:
    """Writes config.json and tokenizer.json; returns bfloat16 tensors that fit, a tied head among them."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(MODEL | {"tie_word_embeddings": True} | changes))
    (directory / "tokenizer.json").write_text("{}")
    weights = {
        name: torch.randn(size).to(torch.bfloat16) for name, size in described(read_model_shape(directory))
    }
    # as transformers before 5 saved them: one storage, two names
    return weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}


@pytest.mark.parametrize("archive", [True, False], ids=["of today", "before torch 1.6"])
def test_one_file_is_converted_once(archive: bool, tmp_path: Path):
    source, cache = tmp_path / "model", tmp_path / CACHE
    weights = random_weights(source)
    torch.save(weights, source / "pytorch_model.bin", _use_new_zipfile_serialization=archive)
    told: list[str] = []
    converted = resolve_model_path(str(source), cache, told.append)
    assert converted.parent == cache and len(told) == 1
    assert resolve_model_path(str(source), cache, told.append) == converted and len(told) == 1
    check_weights(converted, read_model_shape(converted))
    stored = load_file(converted / "model.safetensors")
    assert stored.keys() == weights.keys()
    assert all(torch.equal(stored[name], weights[name]) for name in weights)
    assert sorted(path.name for path in converted.iterdir()) == [
        *("config.json", "converted.json", "model.safetensors", "tokenizer.json"),
    ]
    assert not any(path.suffix == ".safetensors" for path in source.iterdir())


def test_a_changed_original_is_converted_again(tmp_path: Path):
    source, cache = tmp_path / "model", tmp_path / CACHE
    torch.save(random_weights(source), source / "pytorch_model.bin")
    first = with_safetensors(source, cache)
    (source / "config.json").write_text(json.dumps(MODEL | {"tie_word_embeddings": True, "eos_token_id": 3}))
    second = with_safetensors(source, cache)
    assert first != second and read_model_shape(second).eos_ids == (3,)


def test_several_files_and_an_index(tmp_path: Path):
    source = tmp_path / "model"
    weights = random_weights(source)
    names = sorted(weights)
    halves = {"a.bin": names[::2], "b.bin": names[1::2]}
    for file, part in halves.items():
        torch.save({name: weights[name] for name in part}, source / file)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    converted = with_safetensors(source, tmp_path / CACHE)
    check_weights(converted, read_model_shape(converted))
    assert [path.name for path in weight_files(converted)] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    (source / "b.bin").unlink()
    with pytest.raises(ConfigError) as caught:
        with_safetensors(source, tmp_path / CACHE)
    assert str(caught.value) == (
        f"{source} has no b.bin, which its pytorch_model.bin.index.json names; download it again."
    )


def test_safetensors_have_precedence(tmp_path: Path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    (tmp_path / "model.safetensors").touch()
    assert with_safetensors(tmp_path, tmp_path / CACHE) == tmp_path


class Runs:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_what_a_pickle_would_run_is_not_run(tmp_path: Path):
    source, evil = tmp_path / "model", tmp_path / "evil"
    weights: dict[str, object] = {**random_weights(source), "x": Runs(evil)}
    torch.save(weights, source / "pytorch_model.bin")
    with pytest.raises(
        ConfigError, match=r"pytorch_model.bin is damaged, or holds more than tensors, which is not "
    ) as caught:
        with_safetensors(source, tmp_path / CACHE)
    assert "\n" not in str(caught.value)
    assert not evil.exists()
    assert list((tmp_path / CACHE).iterdir()) == []


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 cut", b"nonsense", pickle.dumps([1], 2), pickle.dumps({"a": 1}, 2)]
)
def test_what_is_no_state_dict(content: bytes, tmp_path: Path):
    random_weights(tmp_path / "model")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"^\S+pytorch_model.bin is .*; download the model as safetensors\.$"
    ):
        with_safetensors(tmp_path / "model", tmp_path / CACHE)
