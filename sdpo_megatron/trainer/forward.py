"""One forward function over named weight sets: packed micro-batches in, final hidden states at the loss rows out.

The pipeline schedule is megatron-core's. Each micro-batch's hidden states go to a function of the last stage, which
owns the LM head: it turns them into a loss (learning) or into numbers to keep (scoring).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sdpo_megatron.algorithm.batching import Microbatch
from sdpo_megatron.trainer.attention import TreeParams, tree_params, window_of
from sdpo_megatron.trainer.model import unwrap
from sdpo_megatron.trainer.parallel import ParallelState

from megatron.core.pipeline_parallel import get_forward_backward_func  # isort: skip
from megatron.core.utils import get_model_config  # isort: skip
from megatron.core.tensor_parallel import (  # isort: skip
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

AtLoss = Callable[[Microbatch, Tensor, Tensor], tuple[Tensor, dict[str, Any]]]
"""(micro-batch, hidden_HD, head_VD) -> (loss, results): what the last stage does with final hidden states."""


def run_microbatches(
    chunks: list[nn.Module],
    microbatches: Sequence[Microbatch],
    at_loss: AtLoss,
    parallel: ParallelState,
    *,
    learn: bool,
    reduce: bool = True,
) -> list[dict[str, Any]]:
    """Runs micro-batches forward, and with `learn` backward, through the pipeline. Without `reduce` the gradients stay
    with this rank: more will be added.

    Returns the results of `at_loss`, one per micro-batch, on the last stage; an empty list on the others.
    """
    if not microbatches:
        return []
    schedule = get_forward_backward_func()
    with torch.set_grad_enabled(learn), nullcontext() if reduce else _without_reduction(chunks):
        return schedule(
            forward_step_func=partial(_forward_step, at_loss, parallel),
            data_iterator=iter(microbatches),
            model=chunks,
            num_microbatches=len(microbatches),
            # the true lengths travel with the tensors (variable_seq_lengths); these only must be there
            seq_length=parallel.tp,
            micro_batch_size=1,
            forward_only=not learn,
        )


@contextmanager
def _without_reduction(chunks: list[nn.Module]) -> Iterator[None]:
    """Within this context megatron's schedules do not sum gradients over ranks at their end."""
    config = get_model_config(chunks[0])
    finalize, config.finalize_model_grads_func = config.finalize_model_grads_func, None
    try:
        yield
    finally:
        config.finalize_model_grads_func = finalize


def _forward_step(
    at_loss: AtLoss, parallel: ParallelState, microbatches: Iterator[Microbatch], chunk: nn.Module
) -> tuple[Tensor, Callable]:
    parallel.on_progress()
    microbatch = next(microbatches)
    ids_S, tree = _to_device(microbatch, parallel, window_of(get_model_config(chunk)))
    hidden = chunk(ids_S[None], tree.positions_S[None], None, packed_seq_params=tree)

    def loss_func(hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        if parallel.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=parallel.groups.tp)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=parallel.groups.tp)
        hidden_HD = hidden[microbatch.place_H.to(parallel.device), 0]
        loss, results = at_loss(microbatch, hidden_HD, unwrap(chunk).head_weight())
        # megatron's token count is not used: the loss is already divided by the global one
        return loss, torch.zeros((), dtype=torch.int, device=parallel.device), results

    return hidden, loss_func


def _to_device(
    microbatch: Microbatch, parallel: ParallelState, window: int | None
) -> tuple[Tensor, TreeParams]:
    """Token ids and attention plan; under sequence parallelism padded so that S divides over the ranks."""
    ids_S, positions_S = microbatch.ids_S, microbatch.positions_S
    cu_seqlens_N1, parents_N = list(microbatch.cu_seqlens_N1), list(microbatch.parents_N)
    padding = -len(ids_S) % parallel.tp if parallel.sequence_parallel else 0
    if padding:
        ids_S = torch.cat([ids_S, ids_S.new_zeros(padding)])
        positions_S = torch.cat([positions_S, torch.arange(padding)])
        cu_seqlens_N1.append(len(ids_S))
        parents_N.append(-1)
    tree = tree_params(positions_S, cu_seqlens_N1, parents_N, parallel.device, window)
    return ids_S.to(parallel.device), tree
