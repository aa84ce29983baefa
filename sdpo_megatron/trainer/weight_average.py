"""An exponential moving average of the policy's weights, in float32, sharded as the distributed optimizer's state is.

A rate of 0.01 on a weight of 0.02 that moved by 1e-5 is a change of 1e-7; bfloat16's numbers around 0.02 are 1e-4
apart, so that an average kept in it would never move. The average lies beside the optimizer's master weights
(`StepKeepingOptimizer.average`), each data-parallel rank having its shard, and is saved and resharded with them.
"""

import torch
import torch.distributed as dist
from torch import nn

from sdpo_megatron.trainer.model import unwrap
from sdpo_megatron.trainer.optimizer import StepKeepingOptimizer, parts_of
from sdpo_megatron.trainer.parallel import ParallelState


class WeightAverage:
    """The average, whose methods all ranks call together."""

    def __init__(self, optimizer: object, policy: list[nn.Module], parallel: ParallelState):
        """Starts at the policy's present weights."""
        self._parts = parts_of(optimizer)
        self._policy = policy
        self._parallel = parallel
        for part in self._parts:
            part.average = {main: main.detach().float().clone() for main in part.main_params()}

    @torch.no_grad()
    def update(self, rate: float) -> None:
        """Moves the average: average <- (1 - rate) average + rate policy."""
        for part in self._parts:
            for main, average in part.average.items():
                average.lerp_(main.detach().float(), rate)

    @torch.no_grad()
    def copy_to(self, chunks: list[nn.Module]) -> None:
        """Copies the average into a model of the policy's shape, in its type; each bucket is gathered over the
        data-parallel ranks."""
        into: dict[nn.Parameter, nn.Parameter] = {}
        for own, chunk in zip(self._policy, chunks, strict=True):
            targets = dict(unwrap(chunk).named_parameters())
            into |= {parameter: targets[name] for name, parameter in unwrap(own).named_parameters()}
        for part in self._parts:
            self._gather(part, into)

    def _gather(self, part: StepKeepingOptimizer, into: dict[nn.Parameter, nn.Parameter]) -> None:
        dp = self._parallel.groups.dp_cp
        for buffer, ranges in zip(part.buffers, part.gbuf_ranges, strict=True):
            (buckets,) = ranges.values()
            for bucket, bucket_range in zip(buffer.buckets, buckets, strict=True):
                whole = torch.zeros_like(bucket.param_data).view(-1)
                shard = torch.zeros_like(whole.chunk(dp.size())[dp.rank()])
                for parameter, place in bucket_range["param_map"].items():
                    local = place["gbuf_local"]
                    shard[local.start : local.end] = part.average_of(parameter)
                dist.all_gather_into_tensor(whole, shard, group=dp)
                for parameter in bucket.params_list:
                    start, end, _ = buffer.param_index_map[parameter]
                    here = whole[start - bucket.offset : end - bucket.offset]
                    into[parameter].data.copy_(here.view(parameter.shape))
