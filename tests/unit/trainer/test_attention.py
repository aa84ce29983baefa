"""Attention over token trees against the definition, and rotary embedding against transformers."""

import random
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from sdpo_megatron.algorithm.token_tree import TokenTree, build
from sdpo_megatron.models.shape import Llama3Rope, ModelShape
from sdpo_megatron.trainer import attention
from sdpo_megatron.trainer.attention import (
    TreeAttention,
    TreeParams,
    TreeRotary,
    rotary_frequencies,
    tree_params,
)

CPU = torch.device("cpu")
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8


def random_tree(seed: int) -> TokenTree:
    dice = random.Random(seed)
    sequences = [[dice.randrange(2) for _ in range(dice.randint(1, 9))] for _ in range(dice.randint(1, 10))]
    return build(sequences, share=dice.random() < 0.8)


def plan(tree: TokenTree) -> TreeParams:
    return tree_params(tree.positions_S, tree.cu_seqlens_N1, tree.parents_N, CPU)


def visible(tree: TokenTree) -> Tensor:
    """[S, S]: which rows each row sees, by walking up from each token."""
    sees = torch.zeros(len(tree.ids_S), len(tree.ids_S), dtype=torch.bool)
    for segment, (start, end) in enumerate(zip(tree.cu_seqlens_N1[:-1], tree.cu_seqlens_N1[1:], strict=True)):
        for row in range(start, end):
            sees[row, start : row + 1] = True
            parent = tree.parents_N[segment]
            while parent >= 0:
                sees[row, tree.cu_seqlens_N1[parent] : tree.cu_seqlens_N1[parent + 1]] = True
                parent = tree.parents_N[parent]
    return sees


def planned(params: TreeParams, size: int) -> Tensor:
    """[S, S] that the blocks of a plan stand for."""
    sees = torch.zeros(size, size, dtype=torch.bool)
    for block in params.blocks:
        seen = [*(params.blocks[n] for n in block.prefix), block]
        keys = [k for other in seen for k in range(other.start, other.end)]
        mask = block.mask
        if mask is None:
            rows = block.end - block.start
            mask = torch.ones(rows, len(keys), dtype=torch.bool).tril(len(keys) - rows)
        for row in range(block.start, block.end):
            sees[row, keys] = mask[row - block.start]
    return sees


@pytest.mark.parametrize("dense", [1, 4, 10, 1024])
@pytest.mark.parametrize("seed", range(40))
def test_plan_shows_each_token_its_ancestors(dense: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "DENSE_BLOCK_TOKENS", dense)
    tree = random_tree(seed)
    params = plan(tree)
    assert torch.equal(planned(params, len(tree.ids_S)), visible(tree))
    rows = [row for block in params.blocks for row in range(block.start, block.end)]
    assert rows == list(range(len(tree.ids_S)))


def test_small_subtrees_are_one_block_and_large_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = build([[1, 2, 3, 4], [1, 2, 5, 6], [7, 8]], share=True)
    assert [(b.start, b.end, b.mask is None) for b in plan(tree).blocks] == [(0, 6, False), (6, 8, True)]
    monkeypatch.setattr(attention, "DENSE_BLOCK_TOKENS", 5)
    assert [(b.start, b.end, b.prefix) for b in plan(tree).blocks] == [
        (0, 2, []), (2, 4, [0]), (4, 6, [0]), (6, 8, []),
    ]  # fmt: skip


@pytest.mark.parametrize("dense", [1, 1024])
@pytest.mark.parametrize("seed", range(10))
def test_attention_equals_the_definition(dense: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients, with two query heads to a key head, in float64."""
    monkeypatch.setattr(attention, "DENSE_BLOCK_TOKENS", dense)
    tree = random_tree(seed)
    size = len(tree.ids_S)
    generator = torch.Generator().manual_seed(seed)

    def inputs(heads: int) -> Tensor:
        values = torch.randn(size, 1, heads, HEAD_DIM, dtype=torch.float64, generator=generator)
        return values.requires_grad_()

    query, key, value = inputs(HEADS), inputs(KV_HEADS), inputs(KV_HEADS)
    core = TreeAttention(SimpleNamespace(kv_channels=HEAD_DIM))
    out = core(query, key, value, packed_seq_params=plan(tree))
    upstream = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    own = torch.autograd.grad((out * upstream).sum(), (query, key, value))

    repeated = [x.repeat_interleave(HEADS // KV_HEADS, dim=2)[:, 0] for x in (key, value)]
    scores = torch.einsum("qhd,khd->hqk", query[:, 0], repeated[0]) / HEAD_DIM**0.5
    weights = scores.masked_fill(~visible(tree), float("-inf")).softmax(-1)
    expected = torch.einsum("hqk,khd->qhd", weights, repeated[1]).reshape(size, 1, -1)
    dense_grads = torch.autograd.grad((expected * upstream).sum(), (query, key, value))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(own, dense_grads)


def test_a_child_before_its_parent_is_refused() -> None:
    with pytest.raises(ValueError, match="Segment 0 comes before its parent 1"):
        tree_params(torch.arange(4), [0, 2, 4], [1, -1], CPU)


def shape(scaling: Llama3Rope | None) -> ModelShape:
    return ModelShape(
        architecture="LlamaForCausalLM", layers=2, heads=4, kv_heads=2, head_dim=64, hidden=256, ffn=512, vocab=100,
        tie_embeddings=True, rope_theta=500_000.0, rope_scaling=scaling, rms_norm_eps=1e-5,
        max_positions=131_072, eos_ids=(2,),
    )  # fmt: skip


@pytest.mark.parametrize("scaled", [False, True])
def test_rotary_equals_transformers(scaled: bool) -> None:
    """Llama 3.1's own settings: some wavelengths unchanged, some divided by 8, some between."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = Llama3Rope(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    rope = {"rope_theta": 500_000.0, "rope_type": "default"}
    if scaled:
        rope |= {"rope_type": "llama3", **vars(scaling)}
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        head_dim=64,
        max_position_embeddings=131_072,
        rope_parameters=rope,
    )
    positions = torch.tensor([0, 1, 2, 900, 901, 5, 6, 10_000])
    reference = LlamaRotaryEmbedding(config)
    own = rotary_frequencies(shape(scaling if scaled else None))
    torch.testing.assert_close(own, reference.inv_freq, rtol=1e-6, atol=0.0)
    cos, sin = reference(torch.zeros(1, 8, 256), positions[None])
    tree = TreeParams(positions_S=positions, blocks=[])
    angles = TreeRotary(shape(scaling if scaled else None), CPU)(tree)
    assert angles.shape == (8, 1, 1, 64)
    torch.testing.assert_close(angles[:, 0, 0].cos(), cos[0], rtol=1e-4, atol=2e-3)
    torch.testing.assert_close(angles[:, 0, 0].sin(), sin[0], rtol=1e-4, atol=2e-3)


def test_scaling_matters() -> None:
    scaling = Llama3Rope(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    plain, scaled = rotary_frequencies(shape(None)), rotary_frequencies(shape(scaling))
    assert torch.equal(plain[:4], scaled[:4])
    assert torch.allclose(plain[-4:] / 8, scaled[-4:])
