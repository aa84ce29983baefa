"""Attention over token trees against the definition."""

import random
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from sdpo_megatron.algorithm.token_tree import TokenTree, build
from sdpo_megatron.trainer import attention
from sdpo_megatron.trainer.attention import (
    Block,
    TreeAttention,
    TreeParams,
    tree_params,
)

CPU = torch.device("cpu")
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
WINDOWS = (1, 2, 5, 100)


def random_tree(seed: int) -> TokenTree:
    dice = random.Random(seed)
    sequences = [[dice.randrange(2) for _ in range(dice.randint(1, 9))] for _ in range(dice.randint(1, 10))]
    return build(sequences, share=dice.random() < 0.8)


def plan(tree: TokenTree, window: int | None = None) -> TreeParams:
    return tree_params(tree.positions_S, tree.cu_seqlens_N1, tree.parents_N, CPU, window)


def visible(tree: TokenTree, window: int | None = None) -> Tensor:
    """[S, S]: which rows each row sees, by walking up from each token; of these the last `window`."""
    sees = torch.zeros(len(tree.ids_S), len(tree.ids_S), dtype=torch.bool)
    for segment, (start, end) in enumerate(zip(tree.cu_seqlens_N1[:-1], tree.cu_seqlens_N1[1:], strict=True)):
        for row in range(start, end):
            sees[row, start : row + 1] = True
            parent = tree.parents_N[segment]
            while parent >= 0:
                sees[row, tree.cu_seqlens_N1[parent] : tree.cu_seqlens_N1[parent + 1]] = True
                parent = tree.parents_N[parent]
    if window is not None:
        for row in range(len(sees)):
            # a path's rows are in the order of its positions
            sees[row, sees[row].nonzero()[:-window, 0]] = False
    return sees


def planned(blocks: list[Block], size: int) -> Tensor:
    """[S, S] that the blocks of a plan stand for."""
    sees = torch.zeros(size, size, dtype=torch.bool)
    for block in blocks:
        seen = [*(blocks[n] for n in block.prefix), block]
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
    """All of them, or in layers with a window the last ones."""
    monkeypatch.setattr(attention, "DENSE_BLOCK_TOKENS", dense)
    tree = random_tree(seed)
    params = [plan(tree).blocks, *(plan(tree, window).sliding_blocks for window in WINDOWS)]
    for blocks, window in zip(params, (None, *WINDOWS), strict=True):
        assert torch.equal(planned(blocks, len(tree.ids_S)), visible(tree, window))
        rows = [row for block in blocks for row in range(block.start, block.end)]
        assert rows == list(range(len(tree.ids_S)))


def test_a_window_costs_memory_where_it_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 40 tokens, 30 in a first segment: within the window no mask, behind it no block of more rows than asked and no
    prefix that nobody sees."""
    monkeypatch.setattr(attention, "DENSE_BLOCK_TOKENS", 8)
    tree = build([[*range(40)], [*range(30), *range(50, 60)]], share=True)
    assert [(b.start, b.end, b.mask is None) for b in plan(tree, 41).sliding_blocks] == [
        (0, 30, True), (30, 40, True), (40, 50, True),
    ]  # fmt: skip
    cut = plan(tree, 9).sliding_blocks
    assert [(b.start, b.end, b.prefix, b.mask is None) for b in cut] == [
        (0, 8, [], True), (8, 16, [0], False), (16, 24, [1], False), (24, 30, [2], False),
        (30, 38, [2, 3], False), (38, 40, [4], False), (40, 48, [2, 3], False), (48, 50, [6], False),
    ]  # fmt: skip


def test_small_subtrees_are_one_block_and_large_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = build([[1, 2, 3, 4], [1, 2, 5, 6], [7, 8]], share=True)
    assert [(b.start, b.end, b.mask is None) for b in plan(tree).blocks] == [(0, 6, False), (6, 8, True)]
    monkeypatch.setattr(attention, "DENSE_BLOCK_TOKENS", 5)
    assert [(b.start, b.end, b.prefix) for b in plan(tree).blocks] == [
        (0, 2, []), (2, 4, [0]), (4, 6, [0]), (6, 8, []),
    ]  # fmt: skip


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("dense", [1, 1024])
@pytest.mark.parametrize("seed", range(10))
def test_attention_equals_the_definition(
    dense: int, seed: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients, with two query heads to a key head, in float64."""
    monkeypatch.setattr(attention, "DENSE_BLOCK_TOKENS", dense)
    tree = random_tree(seed)
    size = len(tree.ids_S)
    generator = torch.Generator().manual_seed(seed)

    def inputs(heads: int) -> Tensor:
        values = torch.randn(size, 1, heads, HEAD_DIM, dtype=torch.float64, generator=generator)
        return values.requires_grad_()

    query, key, value = inputs(HEADS), inputs(KV_HEADS), inputs(KV_HEADS)
    config = SimpleNamespace(
        window_size=None if window is None else (window - 1, 0),
        window_attn_skip_freq=[0, 1],
    )
    # the second layer slides, the first does not
    core = TreeAttention(config, 1 if window is None else 2, scale=HEAD_DIM**-0.5)
    out = core(query, key, value, packed_seq_params=plan(tree, window))
    upstream = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    own = torch.autograd.grad((out * upstream).sum(), (query, key, value))

    repeated = [x.repeat_interleave(HEADS // KV_HEADS, dim=2)[:, 0] for x in (key, value)]
    scores = torch.einsum("qhd,khd->hqk", query[:, 0], repeated[0]) / HEAD_DIM**0.5
    weights = scores.masked_fill(~visible(tree, window), float("-inf")).softmax(-1)
    expected = torch.einsum("hqk,khd->qhd", weights, repeated[1]).reshape(size, 1, -1)
    dense_grads = torch.autograd.grad((expected * upstream).sum(), (query, key, value))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(own, dense_grads)


def test_a_child_before_its_parent_is_refused() -> None:
    with pytest.raises(ValueError, match="Segment 0 comes before its parent 1"):
        tree_params(torch.arange(4), [0, 2, 4], [1, -1], CPU)
