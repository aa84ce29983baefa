"""Rotary embedding over packed token trees, with the frequencies that the model asks for."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from sdpo_megatron.models.shape import ModelShape
from sdpo_megatron.trainer.attention import TreeParams


class TreeRotary(nn.Module):
    """Rotary embedding at given positions; stands where GPTModel keeps its own, which knows contiguous ones only."""

    def __init__(self, shape: ModelShape, device: torch.device):
        super().__init__()
        self.inv_freq = rotary_frequencies(shape)[0].to(device)
        self.sliding_inv_freq = None
        if has_two_ropes(shape):
            theta = shape.sliding_rope_theta or shape.rope_theta
            self.sliding_inv_freq = plain_frequencies(shape, theta).to(device)

    def get_rotary_seq_len(self, *args: Any) -> TreeParams:
        """Returns, in place of a length, the tree, which is the last argument: megatron hands it to `forward`."""
        return args[-1]

    def forward(self, tree: TreeParams, **kwargs: Any) -> Tensor:
        """Returns angles [S, 1, 1, head_dim]; where sliding layers have others, [2, S, 1, 1, head_dim], theirs last."""
        angles = _angles(tree.positions_S, self.inv_freq)
        if self.sliding_inv_freq is None:
            return angles
        return torch.stack([angles, _angles(tree.positions_S, self.sliding_inv_freq)])


def _angles(positions_S: Tensor, inv_freq: Tensor) -> Tensor:
    angles = torch.outer(positions_S.to(inv_freq.dtype), inv_freq)
    return torch.cat([angles, angles], dim=-1)[:, None, None, :]


def has_two_ropes(shape: ModelShape) -> bool:
    """Returns whether layers with a sliding window have another rotary embedding than the others."""
    own_base = shape.sliding_rope_theta not in (None, shape.rope_theta)
    return shape.sliding is not None and (own_base or shape.rope_scaling is not None)


def plain_frequencies(shape: ModelShape, theta: float) -> Tensor:
    """Returns inverse frequencies [head_dim / 2] of base `theta`, not scaled."""
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    return 1.0 / (theta**exponents)


def rotary_frequencies(shape: ModelShape) -> tuple[Tensor, float]:
    """Returns inverse frequencies [head_dim / 2] with the model's scaling, as transformers computes it, and what
    queries and keys are each multiplied with then (YaRN, arXiv 2309.00071, section 3.4)."""
    if shape.rope_scaling is None:
        return plain_frequencies(shape, shape.rope_theta), 1.0
    from transformers import PreTrainedConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = shape.rope_scaling.rope_type
    settings: dict[str, Any] = {
        "head_dim": shape.head_dim,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": shape.max_positions,
        "rope_parameters": {"rope_type": kind, "rope_theta": shape.rope_theta, **asdict(shape.rope_scaling)},
    }
    # a model without numbers has these all the same
    with torch.device("cpu"):
        return ROPE_INIT_FUNCTIONS[kind](PreTrainedConfig(**settings), torch.device("cpu"))
