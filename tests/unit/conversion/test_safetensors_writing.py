"""Files that safetensors itself reads, written tensor by tensor."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sdpo_megatron.conversion.safetensors_writing import write_safetensors
from sdpo_megatron.models.weight_files import INDEX, indexed_names

TENSORS = {
    "a": torch.arange(12.0).view(4, 3),
    "b": torch.arange(5).to(torch.bfloat16),
    "c": torch.randn(7, 2, dtype=torch.float64),
    "d": torch.ones(1, 1, dtype=torch.float16),
}


def test_one_file_and_its_header(tmp_path):
    write_safetensors(tmp_path, TENSORS, iter(TENSORS.items()))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    found = load_file(tmp_path / "model.safetensors")
    assert list(found) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_several_files_and_an_index(tmp_path):
    """48, 10, 112 and 2 bytes, at most 60 in a file: what is larger has one of its own."""
    write_safetensors(tmp_path, TENSORS, iter(TENSORS.items()), shard_bytes=60)
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert indexed_names(tmp_path / INDEX) == names
    assert [list(load_file(tmp_path / name)) for name in names] == [["a", "b"], ["c"], ["d"]]
    assert json.loads((tmp_path / INDEX).read_text())["metadata"] == {"total_size": 172}


def test_blocks_of_rows(tmp_path):
    blocks = [("a", TENSORS["a"][:1]), ("a", TENSORS["a"][1:4]), ("b", TENSORS["b"])]
    write_safetensors(tmp_path, {name: TENSORS[name] for name in "ab"}, iter(blocks))
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], TENSORS["a"])


@pytest.mark.parametrize(
    "wrong",
    [
        ("b", TENSORS["a"]),
        ("a", TENSORS["a"].half()),
        ("a", TENSORS["a"].T),
        ("a", TENSORS["a"].repeat(2, 1)),
    ],
    ids=["name", "type", "width", "too many rows"],
)
def test_what_was_not_announced_is_a_bug(wrong, tmp_path):
    with pytest.raises(RuntimeError, match=f"{wrong[0]} came as"):
        write_safetensors(tmp_path, {"a": TENSORS["a"]}, iter([wrong]))
