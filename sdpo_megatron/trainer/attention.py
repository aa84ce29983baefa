"""Attention over packed token trees.

A micro-batch is flat: its N segments lie one after another, and a segment may continue another one (its parent). A
token attends to itself, to earlier tokens of its segment, and to its ancestors' tokens. Without shared prefixes every
segment is a root and this is plain packed causal attention. In a layer with a sliding window it sees the last of these
alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

DENSE_BLOCK_TOKENS = 1024
"""A subtree up to this size attends in one call with an explicit mask; larger ones segment by segment."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Rows [start, end) that attend in one call, to their ancestors and to themselves."""

    start: int
    end: int
    prefix: list[int]
    """The ancestors' numbers in the list of blocks, root first: each is a block of its own."""
    mask: Tensor | None
    """Which keys each row sees, [end - start, keys]; None: all of the prefix and, causally, the block."""


@dataclass(frozen=True, kw_only=True)
class TreeParams:
    """The attention plan, which megatron's `packed_seq_params` argument carries from the model to rotary embedding and
    core attention."""

    positions_S: Tensor
    blocks: list[Block]
    sliding_blocks: list[Block]
    """The same for layers with a sliding window."""
    qkv_format: str = "tree"
    cp_group: Any = None


def tree_params(
    positions_S: Tensor,
    cu_seqlens_N1: Sequence[int],
    parents_N: Sequence[int],
    device: torch.device,
    window: int | None = None,
) -> TreeParams:
    """Plans the attention of one micro-batch, whose segments are in depth-first order, parents first (-1: a root).

    Where the model has a sliding `window`, a token of such a layer sees those that are less than so many positions
    before it, and itself."""
    blocks = _blocks(cu_seqlens_N1, parents_N)
    sliding_blocks = (
        blocks if window is None else _blocks_within(window, positions_S, cu_seqlens_N1, parents_N)
    )
    return TreeParams(
        positions_S=positions_S.to(device),
        blocks=_moved(blocks, device),
        sliding_blocks=_moved(sliding_blocks, device),
    )


def _blocks_within(
    window: int, positions_S: Tensor, cu_seqlens_N1: Sequence[int], parents_N: Sequence[int]
) -> list[Block]:
    def rows_at_once(start: int, end: int) -> int:
        return end - start if positions_S[end - 1] < window else DENSE_BLOCK_TOKENS

    blocks = _blocks(cu_seqlens_N1, parents_N, rows_at_once)
    return [_within(window, block, blocks, positions_S) for block in blocks]


def _blocks(
    cu_seqlens_N1: Sequence[int],
    parents_N: Sequence[int],
    rows_at_once: Callable[[int, int], int] = lambda start, end: end - start,
) -> list[Block]:
    """A segment of more than `rows_at_once(start, end)` becomes several blocks, each with those before it in its
    prefix."""
    last_N = _last_descendant(parents_N)
    blocks: list[Block] = []
    # the blocks of a segment and of its ancestors, root first
    path_of: dict[int, list[int]] = {-1: []}
    segment = 0
    while segment < len(parents_N):
        start = cu_seqlens_N1[segment]
        last = last_N[segment]
        if cu_seqlens_N1[last + 1] - start > DENSE_BLOCK_TOKENS:
            last = segment
        end = cu_seqlens_N1[last + 1]
        path = path_of[segment] = [*path_of[parents_N[segment]]]
        mask = None
        if last > segment:
            before = sum(blocks[k].end - blocks[k].start for k in path)
            mask = _mask(segment, last, cu_seqlens_N1, parents_N, before)
        rows = end - start if mask is not None else rows_at_once(start, end)
        for first in range(start, end, rows):
            blocks.append(Block(start=first, end=min(first + rows, end), prefix=[*path], mask=mask))
            path.append(len(blocks) - 1)
        segment = last + 1
    return blocks


def _within(window: int, block: Block, blocks: Sequence[Block], positions_S: Tensor) -> Block:
    """`block`, one of `blocks`, without what lies outside the window. A block of a prefix is a piece of one segment:
    its last row is the latest."""
    first = int(positions_S[block.start : block.end].min())
    rows = torch.arange(block.start, block.end)
    kept, columns = [], []
    before = 0
    for k in block.prefix:
        count = blocks[k].end - blocks[k].start
        if first - int(positions_S[blocks[k].end - 1]) < window:
            kept.append(k)
            columns.append(torch.arange(before, before + count))
        before += count
    columns.append(torch.arange(before, before + len(rows)))
    keys = torch.cat([*(torch.arange(blocks[k].start, blocks[k].end) for k in kept), rows])
    near = positions_S[rows][:, None] - positions_S[keys][None, :] < window
    if block.mask is None:
        if bool(near.all()):
            return replace(block, prefix=kept)
        return replace(block, prefix=kept, mask=near.tril(len(keys) - len(rows)))
    return replace(block, prefix=kept, mask=block.mask[:, torch.cat(columns)] & near)


def _moved(blocks: Sequence[Block], device: torch.device) -> list[Block]:
    return [block if block.mask is None else replace(block, mask=block.mask.to(device)) for block in blocks]


def _last_descendant(parents_N: Sequence[int]) -> list[int]:
    last_N = list(range(len(parents_N)))
    for segment in range(len(parents_N) - 1, -1, -1):
        if parents_N[segment] >= 0:
            parent = parents_N[segment]
            if parent >= segment:
                raise ValueError(f"Segment {segment} comes before its parent {parent}.")
            last_N[parent] = max(last_N[parent], last_N[segment])
    return last_N


def _mask(
    first: int, last: int, cu_seqlens_N1: Sequence[int], parents_N: Sequence[int], prefix_rows: int
) -> Tensor:
    count = last - first + 1
    sees = torch.eye(count, dtype=torch.bool)
    for i in range(1, count):
        sees[i] |= sees[parents_N[first + i] - first]
    lengths = torch.tensor([cu_seqlens_N1[first + i + 1] - cu_seqlens_N1[first + i] for i in range(count)])
    segment_of_row = torch.repeat_interleave(torch.arange(count), lengths)
    inside = sees[segment_of_row][:, segment_of_row].tril()
    return torch.cat([torch.ones(inside.shape[0], prefix_rows, dtype=torch.bool), inside], dim=1)


class TreeAttention(nn.Module):
    """Core attention [S, 1, heads, head_dim] -> [S, 1, heads * head_dim] through scaled_dot_product_attention.

    Fewer key than query heads (grouped queries) are allowed. This takes the place of megatron's DotProductAttention,
    which knows no packed sequences, and of Transformer Engine's, which knows no shared prefixes.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int = 1,
        *args: Any,
        scale: float,
        sharpening: float = 1.0,
        **kwargs: Any,
    ):
        """Queries times keys are multiplied with `scale`, and by `sharpening` where the rotary embedding is scaled."""
        super().__init__()
        self.slides = slides(config, layer_number)
        # that of sliding layers is not
        self.scale = scale if self.slides else scale * sharpening

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: TreeParams,
        **kwargs: Any,
    ) -> Tensor:
        blocks = packed_seq_params.sliding_blocks if self.slides else packed_seq_params.blocks
        sizes = [block.end - block.start for block in blocks]
        # cut once: the gradient of a slice is as large as what it was cut from, that of a split is one concatenation
        queries, keys, values = (x[:, 0].split(sizes) for x in (query, key, value))
        out = []
        for block, rows in zip(blocks, queries, strict=True):
            own = len(out)
            q, k, v = rows, _joined(keys, [*block.prefix, own]), _joined(values, [*block.prefix, own])
            mask = block.mask
            if mask is None and block.prefix:
                mask = causal_lower_right(len(q), len(k))
            attended = F.scaled_dot_product_attention(
                *(x.transpose(0, 1)[None] for x in (q, k, v)),
                attn_mask=mask,
                is_causal=mask is None,
                scale=self.scale,
                enable_gqa=True,
            )
            out.append(attended[0].transpose(0, 1))
        return torch.cat(out).reshape(query.shape[0], 1, -1)


def _joined(pieces: Sequence[Tensor], which: list[int]) -> Tensor:
    return pieces[which[0]] if len(which) == 1 else torch.cat([pieces[k] for k in which])


def slides(config: Any, layer_number: int) -> bool:
    """Returns whether a layer, counted from 1, has the sliding window of megatron's `config`."""
    return config.window_size is not None and bool(config.window_attn_skip_freq[layer_number - 1])


def window_of(config: Any) -> int | None:
    """Returns how many tokens a token sees in layers with a sliding window, itself included; None: no layer has one.
    Megatron counts those before it."""
    return None if config.window_size is None else config.window_size[0] + 1
