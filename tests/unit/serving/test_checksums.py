"""What a server must say that it holds: names, parts and hashes. That SGLang says so: tests/contract."""

import hashlib

import pytest
import torch

from sdpo_megatron.models.families.base import Rule
from sdpo_megatron.models.shape import read_model_shape
from sdpo_megatron.models.weight_files import described
from sdpo_megatron.serving.checksums import (
    SentChecksums,
    differing,
    gpu_hash,
    padded_rows,
    server_part,
    tensor_hash,
)
from tests.families import MODEL_TYPES


@pytest.mark.parametrize("family", MODEL_TYPES)
@pytest.mark.parametrize("tp", [1, 3])
def test_every_parameter_of_every_family_is_hashed_once_a_rank(tiny_model, family, tp):
    shape = read_model_shape(tiny_model(family))
    sent = SentChecksums(shape, tp)
    for name, size in described(shape):
        sent.add(name, torch.zeros(size))
    layer = {
        "self_attn.qkv_proj.weight",
        "self_attn.o_proj.weight",
    }
    dense = {"mlp.gate_up_proj.weight", "mlp.down_proj.weight"}
    mixed = {"mlp.gate.weight", "mlp.experts.w13_weight", "mlp.experts.w2_weight"}
    layer |= mixed if family == "qwen3_moe" else dense
    for checksums in sent.by_rank:
        assert {f"model.layers.3.{name}" for name in layer} <= checksums.keys()
        assert {"model.embed_tokens.weight", "model.norm.weight"} <= checksums.keys()
        assert not any(
            "q_proj" in name or "up_proj" in name.replace("gate_up_proj", "") or ".experts.0." in name
            for name in checksums
        )
        assert ("model.layers.0.self_attn.qkv_proj.bias" in checksums) == (family == "qwen2")
        after = family.startswith(("olmo", "gemma"))
        assert ("model.layers.0.post_feedforward_layernorm.weight" in checksums) == after
        assert ("model.layers.0.input_layernorm.weight" in checksums) != family.startswith("olmo")


def test_parts_of_more_ranks_than_key_value_heads(tiny_model):
    """Six ranks of three key-value heads: two ranks hold the same head's key and value, each its own query."""
    shape = read_model_shape(tiny_model())
    rows = {"q": 6 * 16, "k": 3 * 16, "v": 3 * 16}
    query, key, value = (
        torch.arange(n, dtype=torch.float32)[:, None] + 1000 * i for i, n in enumerate(rows.values())
    )
    parts = [server_part(Rule.QKV, [query, key, value], shape, 6, rank) for rank in range(6)]
    for rank, part in enumerate(parts):
        q, k, v = part.split(16)
        assert q[0] == 16 * rank and k[0] == 1000 + 16 * (rank // 2) and v[0] == 2000 + 16 * (rank // 2)


@pytest.mark.parametrize(("vocab", "tp", "rows"), [(1026, 1, 1088), (49_152, 8, 49_152), (65, 3, 192)])
def test_rows_of_embedding_and_head(tiny_model, vocab, tp, rows):
    assert padded_rows(vocab, tp) == rows
    shape, whole = read_model_shape(tiny_model()), [torch.ones(vocab, 2)]
    padded = [server_part(Rule.VOCABULARY, whole, shape, tp, rank) for rank in range(tp)]
    assert torch.cat(padded).shape == (rows, 2) and torch.cat(padded)[vocab:].abs().sum() == 0


def test_each_rank_of_a_server_has_the_whole_embedding_of_a_gemma(tiny_model):
    shape, rows = read_model_shape(tiny_model("gemma3_text")), torch.ones(1026, 2)
    assert all(server_part(Rule.VOCABULARY, [rows], shape, 3, rank) is rows for rank in range(3))


def test_what_differs_is_named_and_what_is_not_told_too():
    sent = [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]
    assert differing(sent, [(0, {"a": "1", "b": "2", "rope": "9"}), (1, {"a": "3", "b": "4"})]) == []
    assert differing(sent, [(0, {"a": "1", "b": "2"}), (1, {"a": "3", "b": "5"})]) == ["b"]
    # a server of two pipeline stages
    assert differing(sent[:1], [(0, {"a": "1"}), (0, {"b": "2"})]) == []
    with pytest.raises(KeyError, match="b"):
        differing(sent[:1], [(0, {"a": "1"})])


def test_the_hash_is_of_the_bytes():
    x = torch.randn(3, 5).bfloat16()
    expected = hashlib.sha256(x.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
    assert tensor_hash(x) == tensor_hash(x.T.contiguous().T) == expected
    assert tensor_hash(x.T) != expected


@pytest.mark.parametrize(
    ("count", "dtype", "expected"),
    [
        (7, torch.bfloat16, "6acd222320afb5c2"),
        (8192, torch.float32, "3bf1c6d706aa7adf"),
        (20_001, torch.bfloat16, "64d980f75817742d"),
        (100_000, torch.float32, "e6730d347c7ea005"),
    ],
)
def test_the_hash_of_a_gpu_server(count, dtype, expected):
    """The expected ones are those of SGLang 0.5.23's kernel in Triton's interpreter."""
    x = (torch.arange(count) % 251).to(dtype)
    assert f"{gpu_hash(x.view(torch.uint8)):016x}" == expected
