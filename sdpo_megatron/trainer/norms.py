"""RMSNorms of a layer: as megatron places them, and where megatron has none."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdpo_megatron.trainer.parallel import ParallelState

from megatron.core.tensor_parallel import (  # isort: skip
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint  # isort: skip


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, marked so that its gradient is summed over a sequence-parallel group. With
    `layernorm_zero_centered_gamma` it multiplies with 1 + weight, which is added up and multiplied in float32."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.zero_centered = config.layernorm_zero_centered_gamma

    def forward(self, x: Tensor) -> Tensor:
        if not self.zero_centered:
            return super().forward(x)
        return F.rms_norm(x.float(), self.normalized_shape, 1.0 + self.weight.float(), self.eps).to(x.dtype)


class NormThenAdd(nn.Module):
    """RMSNorm of what a layer's attention or feed-forward network gives, before it is added to what went in.

    It stands where megatron keeps the function that adds bias, drops out and adds the residual: there is no bias and no
    dropout here, and megatron-core 0.16 has no place for such a norm.
    """

    def __init__(self, config: Any):
        super().__init__()
        self.norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        """Returns ((output, bias), residual, dropout) -> sum, [S, 1, hidden]."""

        def add(output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            output, bias = output_with_bias
            assert bias is None and dropout == 0.0
            return residual + self.norm(output)

        return add


class NormOverHeads(nn.Module):
    """RMSNorm of queries or keys [S, 1, heads, head_dim] over all heads together, of which a tensor-parallel rank has
    its part: the mean of squares is over all ranks."""

    def __init__(self, config: Any, hidden_size: int, eps: float, *, heads: int, parallel: ParallelState):
        """`hidden_size` is that of one head, as megatron says it; `heads` are those of all ranks."""
        super().__init__()
        self.eps, self.numbers, self.group = eps, heads * hidden_size, parallel.groups.tp
        own = torch.empty(self.numbers // parallel.tp, dtype=config.params_dtype)
        self.weight = nn.Parameter(own)
        # its gradient is whole on its rank, also under sequence parallelism: attention has all tokens
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(-2).float()
        # megatron adds up a copy of what is not contiguous, and gives back the original
        own = flat.square().sum(-1, keepdim=True).contiguous()
        # what each rank makes of the sum depends on it: its gradient is a sum over ranks again, which the second makes
        squares = copy_to_tensor_model_parallel_region(
            reduce_from_tensor_model_parallel_region(own, self.group), self.group
        )
        mean = squares / self.numbers
        return (self.weight * flat * torch.rsqrt(mean + self.eps)).to(x.dtype).view_as(x)

    def sharded_state_dict(
        self, prefix: str, sharded_offsets: tuple[tuple[int, int, int], ...], metadata: dict[str, Any]
    ) -> dict[str, Any]:
        """Returns what a checkpoint keeps: the weight, cut over tensor-parallel ranks."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=metadata["dp_cp_group"],
        )
