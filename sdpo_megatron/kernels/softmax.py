"""The policy-gradient losses over vocabulary-sharded logits, token-level SDPO above all: definition, Triton kernels,
autograd function.

One sweep over each model's logits gives, per row, the running maximum, the sum of exponentials, the target's logit and
the entropy; one all-gather of these few numbers joins the shards. What follows is of size [T] and plain torch, so that
every coefficient (clip, importance weight, blend) shares the kernels. The gradient overwrites the student's logits:

    d loss / d logit_v = (hot 1[v = target] - dense softmax_v) / temperature,    hot = dense = d loss / d logprob

Nothing of the logits' size is allocated on a GPU. All log-probabilities are of the tempered policy. Differences from
the row's maximum are taken before anything is scaled: the other order loses all digits of logits around 1e4.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdpo_megatron.kernels import softmax_triton
from sdpo_megatron.kernels.vocab import NEGATIVE, RowSoftmax, VocabShard

LossOfRows = Callable[[Tensor], tuple[Tensor, Any]]
"""logprob_U -> (loss, results): the [T]-sized part, differentiable; its gradient is taken at once."""


def policy_gradient_definition(
    logits_TV: Tensor, target_T: Tensor, loss_of: LossOfRows, *, temperature: float
) -> tuple[Tensor, Any]:
    """What `policy_gradient` computes, from whole rows: a loss of the targets' log-probabilities, by autograd."""
    logprobs_TV = (logits_TV / temperature).log_softmax(-1)
    return loss_of(logprobs_TV.gather(1, target_T[:, None])[:, 0])


def policy_gradient(
    logits_TV: Tensor,
    target_T: Tensor,
    loss_of: LossOfRows,
    *,
    shard: VocabShard,
    active_T: Tensor | None = None,
) -> tuple[Tensor, Any, RowSoftmax]:
    """A loss of the targets' log-probabilities, with its gradient written over the logits.

    Args:
        logits_TV: this rank's shard, contiguous, any floating type. Nobody may need them afterwards.
        target_T: token ids of the whole vocabulary.
        loss_of: gets logprob_T, equal on all ranks; what it returns besides the loss is handed on.
        active_T: rows where it is false are never read; their log-probability is 0 and their gradient must be.

    Returns:
        The loss, what `loss_of` returned with it, and the rows' softmax.
    """
    softmax = row_softmax(logits_TV.detach(), target_T, shard, active_T)
    loss, results, slope_T = differentiate(loss_of, softmax.logprob_U)
    if logits_TV.requires_grad:
        with torch.no_grad():
            write_gradient_(logits_TV.detach(), softmax, target_T, slope_T, slope_T, shard)
        loss = GradientInPlace.apply(logits_TV, loss)  # type: ignore[assignment]
    return loss, results, softmax


def differentiate(loss_of: Callable[..., tuple[Tensor, Any]], *leaves: Tensor) -> Any:
    """(loss, results, slope of each leaf): the loss detached, its gradient by autograd on [T]-sized tensors."""
    with torch.enable_grad():
        leaves = tuple(leaf.detach().requires_grad_() for leaf in leaves)
        loss, results = loss_of(*leaves)
        slopes = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return loss.detach(), results, *slopes


class GradientInPlace(torch.autograd.Function):
    """A loss whose gradient by the logits stands in the logits already."""

    @staticmethod
    def forward(ctx, logits_TV: Tensor, loss: Tensor) -> Tensor:  # type: ignore[override]
        ctx.gradient_TV = logits_TV.detach()
        return loss.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return ctx.gradient_TV.mul_(grad), None


def row_softmax(
    logits_UV: Tensor, target_U: Tensor, shard: VocabShard, active_U: Tensor | None = None
) -> RowSoftmax:
    """One sweep and one all-gather; see `policy_gradient` for the arguments."""
    return join(shard.gather(sweep(logits_UV, target_U, shard, active_U)), shard.scale, active_U)


def sweep(logits_UV: Tensor, target_U: Tensor, shard: VocabShard, active_U: Tensor | None = None) -> Tensor:
    """This rank's part of the rows' statistics, [4, U]: maximum, sum of exponentials, the target's logit (0 where it is
    another rank's), sum for the entropy."""
    run = softmax_triton.sweep_triton if logits_UV.is_cuda else sweep_plain
    return run(logits_UV, target_U, shard, active_U)


def join(parts_R4U: Tensor, scale: float, active_U: Tensor | None = None) -> RowSoftmax:
    """The statistics of all ranks' shards in one; the sums are relative to each shard's own maximum."""
    max_RU, sum_RU, target_RU, entropy_RU = parts_R4U.unbind(1)
    max_U = max_RU.amax(0)
    shift_RU = (max_RU - max_U) * scale
    scaled_RU = shift_RU.exp()
    sum_U = (scaled_RU * sum_RU).sum(0)
    log_sum_U = sum_U.log()
    expected_U = (scaled_RU * (entropy_RU + shift_RU * sum_RU)).sum(0) / sum_U
    target_U = target_RU.sum(0)
    logprob_U = (target_U - max_U) * scale - log_sum_U
    entropy_U = log_sum_U - expected_U
    return RowSoftmax(max_U, log_sum_U, where_active(logprob_U, active_U), where_active(entropy_U, active_U))


def where_active(x_U: Tensor, active_U: Tensor | None) -> Tensor:
    return x_U if active_U is None else x_U.where(active_U, x_U.new_zeros(()))


def write_gradient_(
    logits_UV: Tensor,
    softmax: RowSoftmax,
    target_U: Tensor,
    dense_U: Tensor,
    hot_U: Tensor,
    shard: VocabShard,
) -> None:
    """Overwrites the logits by (hot 1[v = target] - dense softmax_v) / temperature; padding columns by 0.

    Rows where both coefficients are 0 are not read."""
    run = softmax_triton.write_gradient_triton if logits_UV.is_cuda else write_gradient_plain
    run(logits_UV, softmax, target_U, dense_U, hot_U, shard)


# ---------------------------------------------------------------- plain torch


def above_max(logits_UV: Tensor, max_U: Tensor) -> Tensor:
    """logit - max in the type to compute with, a new tensor; minus infinity becomes NEGATIVE."""
    wide = torch.promote_types(logits_UV.dtype, torch.float32)
    return torch.clamp(logits_UV.to(wide), min=NEGATIVE).sub_(max_U[:, None])


def sweep_plain(
    logits_UV: Tensor, target_U: Tensor, shard: VocabShard, active_U: Tensor | None = None
) -> Tensor:
    rows, columns = logits_UV.shape
    wide = torch.promote_types(logits_UV.dtype, torch.float32)
    out_4U = torch.zeros(4, rows, dtype=wide, device=logits_UV.device)
    if active_U is not None and not bool(active_U.all()):
        index = active_U.nonzero()[:, 0]
        out_4U[0], out_4U[1] = NEGATIVE, 1.0
        if len(index):
            out_4U[:, index] = sweep_plain(logits_UV[index], target_U[index], shard)
        return out_4U
    valid = shard.valid(columns)
    if valid == 0:
        out_4U[0] = NEGATIVE
        return out_4U
    out_4U[0] = logits_UV[:, :valid].amax(1).clamp_min(NEGATIVE)
    above_UV = above_max(logits_UV[:, :valid], out_4U[0]).mul_(shard.scale)
    exp_UV = above_UV.exp()
    out_4U[1] = exp_UV.sum(1)
    out_4U[3] = above_UV.mul_(exp_UV).sum(1)
    local_U, here_U = shard.own(target_U, columns)
    target_logit_U = logits_UV.gather(1, local_U[:, None])[:, 0].to(wide).clamp_min(NEGATIVE)
    out_4U[2] = target_logit_U.where(here_U, target_logit_U.new_zeros(()))
    return out_4U


def write_gradient_plain(
    logits_UV: Tensor,
    softmax: RowSoftmax,
    target_U: Tensor,
    dense_U: Tensor,
    hot_U: Tensor,
    shard: VocabShard,
) -> None:
    valid = shard.valid(logits_UV.shape[1])
    gradient_UV = above_max(logits_UV[:, :valid], softmax.max_U).mul_(shard.scale)
    gradient_UV.sub_(softmax.log_sum_U[:, None]).exp_().mul_(-shard.scale * dense_U[:, None])
    active_U = (dense_U != 0) | (hot_U != 0)
    finish_gradient_(logits_UV, gradient_UV, target_U, hot_U * shard.scale, active_U, shard)


def finish_gradient_(
    logits_UV: Tensor,
    gradient_UV: Tensor,
    target_U: Tensor,
    hot_U: Tensor,
    active_U: Tensor,
    shard: VocabShard,
) -> None:
    """Adds the targets' entries and puts the gradient where the logits are: 0 in padding and in inactive rows."""
    columns, valid = logits_UV.shape[1], gradient_UV.shape[1]
    local_U, here_U = shard.own(target_U, columns)
    rows = here_U.nonzero()[:, 0]
    gradient_UV[rows, local_U[rows]] += hot_U[rows].to(gradient_UV.dtype)
    gradient_UV[~active_U] = 0.0
    logits_UV[:, :valid] = gradient_UV
    logits_UV[:, valid:] = 0.0
