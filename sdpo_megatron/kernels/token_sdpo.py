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
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdpo_megatron.kernels.vocab import NEGATIVE, VocabShard

LossOfRows = Callable[[Tensor], tuple[Tensor, Any]]
"""logprob_U -> (loss, results): the [T]-sized part, differentiable; its gradient is taken at once."""

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
SWEEP_BLOCK, GRADIENT_BLOCK, WARPS = 4096, 2048, 4

jit: Any = triton.jit
"""Of any type: type checkers know neither the options of a launch nor that plain values become constants."""

_NEGATIVE = tl.constexpr(NEGATIVE)
_LN2 = tl.constexpr(LN2)


@dataclass(frozen=True)
class RowSoftmax:
    """The softmax of each row over the whole vocabulary, at the temperature; float32, or float64 for such logits."""

    max_U: Tensor
    """The largest logit, not divided by the temperature."""
    log_sum_U: Tensor
    """log of the sum of exp((logit - max) / temperature)."""
    logprob_U: Tensor
    """Of the row's target."""
    entropy_U: Tensor
    """In nats."""


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
    run = sweep_triton if logits_UV.is_cuda else sweep_plain
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
    run = write_gradient_triton if logits_UV.is_cuda else write_gradient_plain
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


# -------------------------------------------------------------------- kernels


def flags(active_U: Tensor | None, rows: int, device: torch.device) -> Tensor:
    if active_U is None:
        return torch.ones(rows, dtype=torch.int32, device=device)
    return active_U.to(torch.int32)


def sweep_triton(
    logits_UV: Tensor,
    target_U: Tensor,
    shard: VocabShard,
    active_U: Tensor | None = None,
    block: int = SWEEP_BLOCK,
) -> Tensor:
    rows, columns = logits_UV.shape
    out_4U = torch.empty(4, rows, dtype=torch.float32, device=logits_UV.device)
    _sweep_kernel[(rows,)](
        *(logits_UV, target_U, flags(active_U, rows, logits_UV.device), out_4U),
        *(rows, shard.valid(columns), shard.start, logits_UV.stride(0), shard.scale * LOG2E),
        BLOCK=block,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
    return out_4U


def write_gradient_triton(
    logits_UV: Tensor,
    softmax: RowSoftmax,
    target_U: Tensor,
    dense_U: Tensor,
    hot_U: Tensor,
    shard: VocabShard,
    block: int = GRADIENT_BLOCK,
) -> None:
    rows, columns = logits_UV.shape
    _gradient_kernel[(rows, triton.cdiv(columns, block))](
        *(logits_UV, target_U, softmax.max_U, softmax.log_sum_U, dense_U * shard.scale, hot_U * shard.scale),
        *(shard.valid(columns), columns, shard.start, logits_UV.stride(0), shard.scale * LOG2E),
        BLOCK=block,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )


@jit
def load_logits(X, column, valid, MASKED: tl.constexpr):
    """A block of logits in float32, minus infinity and what lies beyond `valid` as NEGATIVE; NaN stays NaN."""
    if MASKED:
        x = tl.load(X + column, mask=column < valid, other=float("-inf")).to(tl.float32)
    else:
        x = tl.load(X + column).to(tl.float32)
    return tl.maximum(x, _NEGATIVE, propagate_nan=tl.PropagateNan.ALL)


@jit
def load_target(X, y, valid):
    """The target's logit where this shard has it, else 0."""
    here = (y >= 0) & (y < valid)
    x = tl.load(X + y, mask=here, other=0.0).to(tl.float32)
    return tl.maximum(x, _NEGATIVE, propagate_nan=tl.PropagateNan.ALL)


@jit
def _sweep_step(X, column, valid, scale2, m, z, e, MASKED: tl.constexpr):
    x = load_logits(X, column, valid, MASKED)
    m_new = tl.maximum(m, tl.max(x, 0))
    above = (x - m_new) * scale2
    p = tl.exp2(above)
    shift = (m - m_new) * scale2
    shrink = tl.exp2(shift)
    e = shrink * (e + shift * z) + tl.sum(p * above, 0)
    z = shrink * z + tl.sum(p, 0)
    return m_new, z, e


@jit
def _sweep_kernel(X, TARGET, ACTIVE, OUT, rows, valid, start, stride, scale2, BLOCK: tl.constexpr):
    """X bf16 or fp32 [rows, stride]; TARGET int64, ACTIVE int32 [rows]; OUT fp32 [4, rows].

    scale2 = log2(e) / temperature: exponentials are powers of two, the hardware's own."""
    row = tl.program_id(0)
    X += row.to(tl.int64) * stride
    block = tl.arange(0, BLOCK)
    z = tl.zeros([], tl.float32)
    e = tl.zeros([], tl.float32)
    t = tl.zeros([], tl.float32)
    m = z + _NEGATIVE
    if tl.load(ACTIVE + row) != 0:
        whole = (valid // BLOCK) * BLOCK
        for first in range(0, whole, BLOCK):
            m, z, e = _sweep_step(X, first + block, valid, scale2, m, z, e, False)
        if whole < valid:
            m, z, e = _sweep_step(X, whole + block, valid, scale2, m, z, e, True)
        t = load_target(X, tl.load(TARGET + row) - start, valid)
    else:
        z += 1.0
    tl.store(OUT + row, m)
    tl.store(OUT + rows + row, z)
    tl.store(OUT + 2 * rows + row, t)
    tl.store(OUT + 3 * rows + row, e * _LN2)


@jit
def _gradient_kernel(
    X, TARGET, MAX, LOG_SUM, DENSE, HOT, valid, columns, start, stride, scale2, BLOCK: tl.constexpr
):
    """X [rows, stride], overwritten; TARGET int64, the others fp32 [rows]. DENSE and HOT carry 1 / temperature."""
    row = tl.program_id(0)
    first = tl.program_id(1) * BLOCK
    column = first + tl.arange(0, BLOCK)
    X += row.to(tl.int64) * stride
    dense = tl.load(DENSE + row)
    hot = tl.load(HOT + row)
    inside = column < columns
    if (dense == 0.0) & (hot == 0.0):
        tl.store(X + column, tl.zeros([BLOCK], tl.float32).to(X.dtype.element_ty), mask=inside)
    else:
        x = load_logits(X, column, valid, True)
        log2_sum = tl.load(LOG_SUM + row) * 1.4426950408889634
        d = tl.exp2((x - tl.load(MAX + row)) * scale2 - log2_sum) * (-dense)
        y = (tl.load(TARGET + row) - start).to(tl.int32)
        if (y >= first) & (y < first + BLOCK) & (y < valid):
            d = tl.where(column == y, d + hot, d)
        tl.store(X + column, d.to(X.dtype.element_ty), mask=inside)
