"""The policy computed in float32: what its own type's rounding does to log-probabilities shows beside it."""

from collections.abc import Sequence

import torch
from torch import nn

from sdpo_megatron.models.shape import ModelShape
from sdpo_megatron.trainer.model import build_model, unwrap
from sdpo_megatron.trainer.parallel import ParallelState
from sdpo_megatron.trainer.score import Scorer


@torch.no_grad()
def in_float32(
    policy: Sequence[nn.Module], scorer: Scorer, shape: ModelShape, parallel: ParallelState
) -> Scorer:
    """Returns a scorer like `scorer` of the same weights, which computes in float32; it holds 4 bytes a parameter."""
    wide = build_model(shape, torch.float32, parallel)
    for chunk, own in zip(wide, policy, strict=True):
        for parameter, narrow in zip(unwrap(chunk).parameters(), unwrap(own).parameters(), strict=True):
            parameter.copy_(narrow)
    return Scorer(wide, scorer.head, scorer.packer, parallel)
