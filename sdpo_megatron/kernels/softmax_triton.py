"""The Triton kernels of `softmax.py`; what they compute is said there.

Arguments of the kernels here and in `divergence_triton.py`, R the number of rows:

    X, S, T     logits, the student's, the teacher's; bfloat16 or float32 [R, stride], columns contiguous
    TARGET      token ids of the whole vocabulary; int64 [R], contiguous, which a column of a table is not
    MAX, LOG_SUM, ...  other capitals are float32 [R] and contiguous, a softmax's or the gradient's coefficients
    OUT         results; float32 [a few, R], in an order that the kernel states
    rows        R
    columns     of this rank's shard, padding included
    valid       columns before the padding
    start       token id of the first column
    scale2      log2(e) / temperature: exponentials and logarithms are to the base 2, the hardware's own
    BLOCK       columns that a program has at a time

Minus infinity is the finite NEGATIVE, so that no branch is needed for it.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdpo_megatron.kernels.rows import RowSoftmax
from sdpo_megatron.kernels.vocab import NEGATIVE, VocabShard

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
SWEEP_BLOCK, GRADIENT_BLOCK, WARPS = 4096, 2048, 4

jit: Any = triton.jit
"""triton.jit as of any type: type checkers know neither the options of a launch nor that plain values become
constants."""

_NEGATIVE = tl.constexpr(NEGATIVE)
_LN2 = tl.constexpr(LN2)
_LOG2E = tl.constexpr(LOG2E)


def sweep_triton(logits_UV: Tensor, target_U: Tensor, shard: VocabShard, block: int = SWEEP_BLOCK) -> Tensor:
    rows, columns = logits_UV.shape
    out_4U = torch.empty(4, rows, dtype=torch.float32, device=logits_UV.device)
    _sweep_kernel[(rows,)](
        X=logits_UV,
        TARGET=target_U.contiguous(),
        OUT=out_4U,
        rows=rows,
        valid=shard.valid(columns),
        start=shard.start,
        stride=logits_UV.stride(0),
        scale2=shard.scale * LOG2E,
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
        X=logits_UV,
        TARGET=target_U.contiguous(),
        MAX=softmax.max_U.contiguous(),
        LOG_SUM=softmax.log_sum_U.contiguous(),
        DENSE=(dense_U * shard.scale).contiguous(),
        HOT=(hot_U * shard.scale).contiguous(),
        valid=shard.valid(columns),
        columns=columns,
        start=shard.start,
        stride=logits_UV.stride(0),
        scale2=shard.scale * LOG2E,
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
    """Running maximum, sum of exponentials and sum for the entropy, with one more block."""
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
def _sweep_kernel(X, TARGET, OUT, rows, valid, start, stride, scale2, BLOCK: tl.constexpr):
    """OUT [4, R] is in the order of `ShardSums`. A program has one row."""
    row = tl.program_id(0)
    X += row.to(tl.int64) * stride
    block = tl.arange(0, BLOCK)
    z = tl.zeros([], tl.float32)
    e = tl.zeros([], tl.float32)
    m = z + _NEGATIVE
    whole = (valid // BLOCK) * BLOCK
    for first in range(0, whole, BLOCK):
        m, z, e = _sweep_step(X, first + block, valid, scale2, m, z, e, False)
    if whole < valid:
        m, z, e = _sweep_step(X, whole + block, valid, scale2, m, z, e, True)
    tl.store(OUT + row, m)
    tl.store(OUT + rows + row, z)
    tl.store(OUT + 2 * rows + row, load_target(X, tl.load(TARGET + row) - start, valid))
    tl.store(OUT + 3 * rows + row, e * _LN2)


@jit
def _gradient_kernel(
    X, TARGET, MAX, LOG_SUM, DENSE, HOT, valid, columns, start, stride, scale2, BLOCK: tl.constexpr
):
    """X is overwritten by its gradient. DENSE and HOT carry 1 / temperature. A program has one block of one row."""
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
        log2_sum = tl.load(LOG_SUM + row) * _LOG2E
        d = tl.exp2((x - tl.load(MAX + row)) * scale2 - log2_sum) * (-dense)
        y = (tl.load(TARGET + row) - start).to(tl.int32)
        if (y >= first) & (y < first + BLOCK) & (y < valid):
            d = tl.where(column == y, d + hot, d)
        tl.store(X + column, d.to(X.dtype.element_ty), mask=inside)
