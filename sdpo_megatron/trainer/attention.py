"""Attention over packed token trees, and the layer spec that uses it.

A micro-batch is flat: its N segments lie one after another, and a segment may continue another one (its parent). A
token attends to itself, to earlier tokens of its segment, and to its ancestors' tokens. Without shared prefixes every
segment is a root and this is plain packed causal attention.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from sdpo_megatron.models.shape import ModelShape

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
    qkv_format: str = "tree"
    cp_group: Any = None


def tree_params(
    positions_S: Tensor, cu_seqlens_N1: Sequence[int], parents_N: Sequence[int], device: torch.device
) -> TreeParams:
    """Plans the attention of one micro-batch, whose segments are in depth-first order, parents first (-1: a root)."""
    last_N = _last_descendant(parents_N)
    blocks: list[Block] = []
    block_of: dict[int, int] = {}
    segment = 0
    while segment < len(parents_N):
        start = cu_seqlens_N1[segment]
        last = last_N[segment]
        if cu_seqlens_N1[last + 1] - start > DENSE_BLOCK_TOKENS:
            last = segment
        prefix = [block_of[ancestor] for ancestor in _ancestors(segment, parents_N)]
        mask = None
        if last > segment:
            before = sum(blocks[k].end - blocks[k].start for k in prefix)
            mask = _mask(segment, last, cu_seqlens_N1, parents_N, before).to(device)
        block_of[segment] = len(blocks)
        blocks.append(Block(start=start, end=cu_seqlens_N1[last + 1], prefix=prefix, mask=mask))
        segment = last + 1
    return TreeParams(positions_S=positions_S.to(device), blocks=blocks)


def _last_descendant(parents_N: Sequence[int]) -> list[int]:
    last_N = list(range(len(parents_N)))
    for segment in range(len(parents_N) - 1, -1, -1):
        if parents_N[segment] >= 0:
            parent = parents_N[segment]
            if parent >= segment:
                raise ValueError(f"Segment {segment} comes before its parent {parent}.")
            last_N[parent] = max(last_N[parent], last_N[segment])
    return last_N


def _ancestors(segment: int, parents_N: Sequence[int]) -> list[int]:
    found = []
    while (segment := parents_N[segment]) >= 0:
        found.append(segment)
    return found[::-1]


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

    def __init__(self, config: Any, *args: Any, softmax_scale: float | None = None, **kwargs: Any):
        super().__init__()
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

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
        blocks = packed_seq_params.blocks
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


class TreeRotary(nn.Module):
    """Rotary embedding at given positions; stands where GPTModel keeps its own, which knows contiguous ones only."""

    def __init__(self, shape: ModelShape, device: torch.device):
        super().__init__()
        self.inv_freq = rotary_frequencies(shape).to(device)

    def get_rotary_seq_len(self, *args: Any) -> TreeParams:
        """Returns, in place of a length, the tree, which is the last argument: megatron hands it to `forward`."""
        return args[-1]

    def forward(self, tree: TreeParams, **kwargs: Any) -> Tensor:
        """Returns angles [S, 1, 1, head_dim]."""
        angles = torch.outer(tree.positions_S.to(self.inv_freq.dtype), self.inv_freq)
        return torch.cat([angles, angles], dim=-1)[:, None, None, :]


def rotary_frequencies(shape: ModelShape) -> Tensor:
    """Returns inverse frequencies [head_dim / 2], with Llama 3.1's scaling by wavelength where the model asks for
    it."""
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    inv_freq = 1.0 / (shape.rope_theta**exponents)
    scaling = shape.rope_scaling
    if scaling is None:
        return inv_freq
    wavelengths = 2 * math.pi / inv_freq
    smooth = (scaling.original_max_position_embeddings / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smooth = smooth.clamp(0.0, 1.0)
    return (1 - smooth) * inv_freq / scaling.factor + smooth * inv_freq


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, marked so that its gradient is summed over a sequence-parallel group."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
