"""megatron-core's distributed optimizer and learning-rate schedule, from our settings."""

from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from sdpo_megatron.config import OptimizerSettings
from sdpo_megatron.trainer.parallel import ParallelState

from megatron.core.dist_checkpointing.dict_utils import nested_values  # isort: skip
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory  # isort: skip
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories  # isort: skip
from megatron.core.distributed import (  # isort: skip
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # isort: skip
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # isort: skip
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler  # isort: skip
from megatron.core.transformer.module import MegatronModule  # isort: skip
from megatron.core.utils import get_model_config  # isort: skip


AVERAGE = "average"
"""What a checkpoint calls the weights' average."""


class StepKeepingOptimizer(DistributedOptimizer):
    """The distributed optimizer, able to load its state where the inner optimizer is torch's Adam.

    torch's Adam keeps a tensor `step` beside its moments. megatron-core saves it once for all parameters, and then
    misses it in each parameter's own record on loading (KeyError: 'step'; 0.16.1 and 0.19.2, CPU and GPU). What a
    record lacks stays as it is: `load_state_dict` has restored `step` before, as one tensor that all records share,
    which Adam would then advance once for each of them.

    It also keeps an average of the weights where somebody (`WeightAverage`) gives it one: a fourth number beside each
    float32 weight and its two moments, which is sharded, saved and loaded as they are.
    """

    average: dict[torch.Tensor, torch.Tensor] = {}
    """The average by main parameter (this rank's shard of a weight); empty where no average is kept."""
    _average_as_param = False

    def make_state(self) -> None:
        """Makes now what Adam makes at its first step: megatron-core cannot save or load an optimizer without it."""
        if not isinstance(self.optimizer, torch.optim.Adam | torch.optim.AdamW):
            return
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }

    def main_params(self) -> list[torch.Tensor]:
        """Returns this rank's shards of the weights that the optimizer changes."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def average_of(self, model_param: nn.Parameter) -> torch.Tensor:
        """Returns the average of this rank's shard of `model_param`."""
        group, place = self.model_param_group_index_map[model_param]
        return self.average[self.optimizer.param_groups[group]["params"][place]]

    def _get_main_param_and_optimizer_states(self, model_param):
        tensors = super()._get_main_param_and_optimizer_states(model_param)
        if self.average:
            if self._average_as_param:
                return {**tensors, "param": self.average_of(model_param)}
            tensors[AVERAGE] = self.average_of(model_param)
        return tensors

    def _set_main_param_and_optimizer_states(self, model_param, tensors):
        tensors = {**self._get_main_param_and_optimizer_states(model_param), **tensors}
        if self.average:
            self.average_of(model_param).copy_(tensors.pop(AVERAGE))
        super()._set_main_param_and_optimizer_states(model_param, tensors)

    @torch.no_grad()
    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for record in self.optimizer.state.values():
            if "step" in record:
                record["step"] = record["step"].clone()

    def sharded_param_state_fully_reshardable(
        self, model_sharded_state_dict: Any, is_loading: bool = False, metadata: dict | None = None
    ) -> dict[int, dict[str, Any]] | None:
        """Returns each parameter's moments, its average if there is one, and its float32 copy where it is not in
        float32 itself, in the parameter's shape.

        With one data-parallel rank they are what the optimizer holds, not copies of it: megatron-core's own copies
        would double the memory of a training process at every save. They are saved and loaded in place. The result is
        None on a data-parallel rank that leaves its part of the state to the first one.
        """
        if self.data_parallel_group.size() > 1:
            state = self._gathered_state(model_sharded_state_dict, is_loading, metadata)
        else:
            state = self._views_of_state(model_sharded_state_dict)
        # the parameter itself is saved with the model
        if self.config.params_dtype == torch.float32:
            for record in (state or {}).values():
                del record["param"]
        return state

    def _gathered_state(
        self, model_sharded_state_dict: Any, is_loading: bool, metadata: dict | None
    ) -> dict[int, dict[str, Any]] | None:
        """megatron-core gathers the weight and two moments, by name: the average goes a second time, as a weight."""

        def gather() -> dict[int, dict[str, Any]] | None:
            return super(StepKeepingOptimizer, self).sharded_param_state_fully_reshardable(
                model_sharded_state_dict, is_loading, metadata
            )

        state = gather()
        if self.average:
            self._average_as_param = True
            try:
                averages = gather()
            finally:
                self._average_as_param = False
            for record, other in zip((state or {}).values(), (averages or {}).values(), strict=True):
                key = other["param"].key.replace("optimizer.state.param.", f"optimizer.state.{AVERAGE}.", 1)
                record[AVERAGE] = replace(other["param"], key=key)
        return state

    def _views_of_state(self, model_sharded_state_dict: Any) -> dict[int, dict[str, Any]]:
        described, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
        sharding_of = {sharding.data: sharding for sharding in nested_values(described)}
        state: dict[int, dict[str, Any]] = {}
        for buffer in self.buffers:
            for parameter in buffer.param_index_map:
                sharding = sharding_of[parameter]
                record = {}
                for name, tensor in self._get_main_param_and_optimizer_states(parameter).items():
                    if name == "step":
                        continue
                    changes = {
                        "key": f"optimizer.state.{name}.{sharding.key}",
                        "data": tensor.detach().view(sharding.data.shape),
                    }
                    if not isinstance(sharding, ShardedTensorFactory):
                        changes["dtype"] = tensor.dtype
                    record[name] = replace(sharding, **changes)
                state[len(state)] = record
        return state


def wrap_for_data_parallelism(chunks: list[nn.Module]) -> list[nn.Module]:
    """Wraps chunks in megatron's DDP: gradients are summed in float32 over data-parallel ranks, and optimizer state is
    divided over them."""
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    wrapped: list[nn.Module] = []
    for chunk in chunks:
        config = get_model_config(chunk)
        config.finalize_model_grads_func = _finalize
        wrapped.append(DistributedDataParallel(config, settings, chunk))
    return wrapped


def _finalize(model: list[nn.Module], num_tokens: torch.Tensor | None = None, **kwargs: Any) -> None:
    # the loss divides by the global token count, so megatron must not divide once more
    finalize_model_grads(model, None, **kwargs)


def build_optimizer(
    chunks: list[nn.Module], settings: OptimizerSettings, total_steps: int, parallel: ParallelState
) -> tuple[Any, OptimizerParamScheduler]:
    """Returns AdamW over the wrapped chunks, and its schedule over `total_steps` optimizer steps."""
    config = get_model_config(chunks[0])
    optimizer: Any = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.beta1,
            adam_beta2=settings.beta2,
            adam_eps=settings.eps,
            clip_grad=settings.clip_grad_norm,
            bf16=config.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=True,
        ),
        cast(list[MegatronModule], chunks),
    )
    for part in optimizer.chained_optimizers:
        if type(part) is DistributedOptimizer:
            part.__class__ = StepKeepingOptimizer
            cast(StepKeepingOptimizer, part).make_state()
    config.grad_scale_func = optimizer.scale_loss
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.warmup_steps,
        lr_decay_steps=max(total_steps, settings.warmup_steps + 1),
        lr_decay_style=settings.schedule,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    return optimizer, schedule


def parts_of(optimizer: Any) -> list[StepKeepingOptimizer]:
    """Returns the optimizers of which megatron's chained one consists; those of a rank without weights are left out."""
    return [part for part in optimizer.chained_optimizers if isinstance(part, StepKeepingOptimizer)]
