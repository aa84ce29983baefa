"""The Triton kernels of `divergence.py`; what they compute is said there.

Exponentials and logarithms are to the base 2, the hardware's own. Minus infinity is the finite NEGATIVE, so that no
branch is needed for it."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdpo_megatron.kernels.softmax_triton import LN2, LOG2E, flags, jit, load_logits, load_target
from sdpo_megatron.kernels.vocab import NEGATIVE, RowSoftmax, VocabShard

SWEEP_BLOCK, GRADIENT_BLOCK, WARPS = 2048, 2048, 4
_NEGATIVE = tl.constexpr(NEGATIVE)
_LN2 = tl.constexpr(LN2)
_LOG2E = tl.constexpr(LOG2E)
_FORWARD, _MIXTURE, _REVERSE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


def joint_sweep_triton(
    student_UV: Tensor,
    teacher_UV: Tensor,
    target_U: Tensor,
    forward: bool,
    shard: VocabShard,
    active_U: Tensor | None = None,
    block: int = SWEEP_BLOCK,
) -> Tensor:
    rows, columns = student_UV.shape
    out_9U = torch.empty(9, rows, dtype=torch.float32, device=student_UV.device)
    _joint_sweep_kernel[(rows,)](
        *(student_UV, teacher_UV, target_U, flags(active_U, rows, student_UV.device), out_9U),
        *(
            rows,
            shard.valid(columns),
            shard.start,
            student_UV.stride(0),
            teacher_UV.stride(0),
            shard.scale * LOG2E,
        ),
        FORWARD=forward,
        BLOCK=block,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
    return out_9U


def mixture_triton(
    student_UV: Tensor,
    teacher_UV: Tensor,
    student: RowSoftmax,
    teacher: RowSoftmax,
    alpha: float,
    shard: VocabShard,
    active_U: Tensor | None = None,
    block: int = SWEEP_BLOCK,
) -> Tensor:
    rows, columns = student_UV.shape
    out_2U = torch.empty(2, rows, dtype=torch.float32, device=student_UV.device)
    _mixture_kernel[(rows,)](
        *(student_UV, teacher_UV, flags(active_U, rows, student_UV.device)),
        *(student.max_U, student.log_sum_U, teacher.max_U, teacher.log_sum_U, out_2U),
        *(rows, shard.valid(columns), student_UV.stride(0), teacher_UV.stride(0), shard.scale * LOG2E),
        *(math.log2(1 - alpha), math.log2(alpha)),
        BLOCK=block,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
    return out_2U


def write_gradient_triton(
    student_UV: Tensor,
    teacher_UV: Tensor,
    target_U: Tensor,
    student: RowSoftmax,
    teacher: RowSoftmax,
    offset_U: Tensor,
    weight_U: Tensor,
    slope_U: Tensor,
    alpha: float,
    shard: VocabShard,
    block: int = GRADIENT_BLOCK,
) -> None:
    count, columns = student_UV.shape
    kind = _FORWARD if alpha == 0 else _REVERSE if alpha == 1 else _MIXTURE
    weight_U = weight_U * shard.scale * (1 - alpha if kind is _MIXTURE else 1)
    log2_weights = (math.log2(1 - alpha), math.log2(alpha)) if kind is _MIXTURE else (0.0, 0.0)
    _divergence_gradient_kernel[(count, triton.cdiv(columns, block))](
        *(student_UV, teacher_UV, target_U, student.max_U, student.log_sum_U),
        *(teacher.max_U, teacher.log_sum_U, offset_U, weight_U, slope_U * shard.scale),
        *(shard.valid(columns), columns, shard.start, student_UV.stride(0), teacher_UV.stride(0)),
        *(shard.scale * LOG2E, *log2_weights),
        KIND=kind.value,
        BLOCK=block,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )


@jit
def _joint_step(
    S, T, column, valid, scale2, ms, mt, zs, zt, es, kl, FORWARD: tl.constexpr, MASKED: tl.constexpr
):
    s = load_logits(S, column, valid, MASKED)
    t = load_logits(T, column, valid, MASKED)
    ms_new = tl.maximum(ms, tl.max(s, 0))
    mt_new = tl.maximum(mt, tl.max(t, 0))
    above_s = (s - ms_new) * scale2
    above_t = (t - mt_new) * scale2
    p = tl.exp2(above_s)
    q = tl.exp2(above_t)
    shift_s = (ms - ms_new) * scale2
    shift_t = (mt - mt_new) * scale2
    shrink_s = tl.exp2(shift_s)
    shrink_t = tl.exp2(shift_t)
    if FORWARD:
        kl = shrink_t * (kl + (shift_t - shift_s) * zt) + tl.sum(q * (above_t - above_s), 0)
    else:
        kl = shrink_s * (kl + (shift_s - shift_t) * zs) + tl.sum(p * (above_s - above_t), 0)
    es = shrink_s * (es + shift_s * zs) + tl.sum(p * above_s, 0)
    zs = shrink_s * zs + tl.sum(p, 0)
    zt = shrink_t * zt + tl.sum(q, 0)
    return ms_new, mt_new, zs, zt, es, kl


@jit
def _joint_sweep_kernel(
    S, T, TARGET, ACTIVE, OUT, rows, valid, start, stride_s, stride_t, scale2,
    FORWARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """S, T bf16 or fp32 [rows, stride]; OUT fp32 [9, rows]: two times max, sum, target, entropy sum; then the KL sum.

    The teacher's entropy is nobody's concern and stays 0."""
    row = tl.program_id(0)
    S += row.to(tl.int64) * stride_s
    T += row.to(tl.int64) * stride_t
    block = tl.arange(0, BLOCK)
    zs = tl.zeros([], tl.float32)
    zt = tl.zeros([], tl.float32)
    es = tl.zeros([], tl.float32)
    kl = tl.zeros([], tl.float32)
    ts = tl.zeros([], tl.float32)
    tt = tl.zeros([], tl.float32)
    ms = zs + _NEGATIVE
    mt = zs + _NEGATIVE
    if tl.load(ACTIVE + row) != 0:
        whole = (valid // BLOCK) * BLOCK
        for first in range(0, whole, BLOCK):
            ms, mt, zs, zt, es, kl = _joint_step(
                S, T, first + block, valid, scale2, ms, mt, zs, zt, es, kl, FORWARD, False
            )
        if whole < valid:
            ms, mt, zs, zt, es, kl = _joint_step(
                S, T, whole + block, valid, scale2, ms, mt, zs, zt, es, kl, FORWARD, True
            )
        y = tl.load(TARGET + row) - start
        ts = load_target(S, y, valid)
        tt = load_target(T, y, valid)
    else:
        zs += 1.0
        zt += 1.0
    tl.store(OUT + row, ms)
    tl.store(OUT + rows + row, zs)
    tl.store(OUT + 2 * rows + row, ts)
    tl.store(OUT + 3 * rows + row, es * _LN2)
    tl.store(OUT + 4 * rows + row, mt)
    tl.store(OUT + 5 * rows + row, zt)
    tl.store(OUT + 6 * rows + row, tt)
    tl.store(OUT + 7 * rows + row, 0.0)
    tl.store(OUT + 8 * rows + row, kl * _LN2)


@jit
def _log2_pair(S, T, column, valid, ms, log2_zs, mt, log2_zt, scale2, MASKED: tl.constexpr):
    """log2 p and log2 q."""
    log2_p = (load_logits(S, column, valid, MASKED) - ms) * scale2 - log2_zs
    log2_q = (load_logits(T, column, valid, MASKED) - mt) * scale2 - log2_zt
    return log2_p, log2_q


@jit
def _log2_1p(u):
    """log2(1 + u) for 0 <= u <= 1, within 2e-7: the minimax polynomial of degree 8 without constant term.

    tl.log2 is a library's routine for any number, of 24 instructions."""
    y = -0.009309140034019947 * u + 0.052058909088373184
    y = y * u - 0.13752120733261108
    y = y * u + 0.2418646514415741
    y = y * u - 0.34730103611946106
    y = y * u + 0.4786836802959442
    y = y * u - 0.7211657762527466
    y = y * u + 1.4426898956298828
    return y * u


@jit
def _log2_mixture(log2_p, log2_q, log2_a, log2_b):
    """log2(m/p) and log2(m/q) for m = a p + b q, exact also where p or q is 0."""
    d = (log2_q - log2_p) + (log2_b - log2_a)
    rest = _log2_1p(tl.exp2(-tl.abs(d)))
    return (rest + log2_a) + tl.maximum(d, 0.0), (rest + log2_b) + tl.maximum(-d, 0.0)


@jit
def _partial_sums(x):
    """Of every four neighbours, which are in one thread's registers: no barrier."""
    return tl.sum(tl.reshape(x, [x.shape[0] // 4, 4]), 1)


@jit
def _mixture_step(
    S, T, column, valid, ms, log2_zs, mt, log2_zt, scale2, log2_a, log2_b, student, teacher,
    MASKED: tl.constexpr,
):  # fmt: skip
    log2_p, log2_q = _log2_pair(S, T, column, valid, ms, log2_zs, mt, log2_zt, scale2, MASKED)
    m_over_p, m_over_q = _log2_mixture(log2_p, log2_q, log2_a, log2_b)
    student -= _partial_sums(tl.exp2(log2_p) * m_over_p)
    teacher -= _partial_sums(tl.exp2(log2_q) * m_over_q)
    return student, teacher


@jit
def _mixture_kernel(
    S, T, ACTIVE, MAX_S, LOG_SUM_S, MAX_T, LOG_SUM_T, OUT,
    rows, valid, stride_s, stride_t, scale2, log2_a, log2_b,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """OUT fp32 [2, rows]: this shard's part of KL(p || m) and KL(q || m), m = a p + b q."""
    row = tl.program_id(0)
    S += row.to(tl.int64) * stride_s
    T += row.to(tl.int64) * stride_t
    block = tl.arange(0, BLOCK)
    student = tl.zeros([BLOCK // 4], tl.float32)
    teacher = tl.zeros([BLOCK // 4], tl.float32)
    if tl.load(ACTIVE + row) != 0:
        ms = tl.load(MAX_S + row)
        mt = tl.load(MAX_T + row)
        log2_zs = tl.load(LOG_SUM_S + row) * _LOG2E
        log2_zt = tl.load(LOG_SUM_T + row) * _LOG2E
        whole = (valid // BLOCK) * BLOCK
        for first in range(0, whole, BLOCK):
            student, teacher = _mixture_step(
                *(S, T, first + block, valid, ms, log2_zs, mt, log2_zt, scale2, log2_a, log2_b),
                *(student, teacher, False),
            )
        if whole < valid:
            student, teacher = _mixture_step(
                *(S, T, whole + block, valid, ms, log2_zs, mt, log2_zt, scale2, log2_a, log2_b),
                *(student, teacher, True),
            )
    tl.store(OUT + row, tl.sum(student, 0) * _LN2)
    tl.store(OUT + rows + row, tl.sum(teacher, 0) * _LN2)


@jit
def _divergence_gradient_kernel(
    S, T, TARGET, MAX_S, LOG_SUM_S, MAX_T, LOG_SUM_T, OFFSET, WEIGHT, SLOPE,
    valid, columns, start, stride_s, stride_t, scale2, log2_a, log2_b,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """S is overwritten. WEIGHT and SLOPE carry 1 / temperature, and WEIGHT the mixture's a."""
    row = tl.program_id(0)
    first = tl.program_id(1) * BLOCK
    column = first + tl.arange(0, BLOCK)
    S += row.to(tl.int64) * stride_s
    T += row.to(tl.int64) * stride_t
    weight = tl.load(WEIGHT + row)
    slope = tl.load(SLOPE + row)
    inside = column < columns
    if (weight == 0.0) & (slope == 0.0):
        tl.store(S + column, tl.zeros([BLOCK], tl.float32).to(S.dtype.element_ty), mask=inside)
    else:
        log2_p, log2_q = _log2_pair(
            *(S, T, column, valid, tl.load(MAX_S + row), tl.load(LOG_SUM_S + row) * _LOG2E),
            *(tl.load(MAX_T + row), tl.load(LOG_SUM_T + row) * _LOG2E, scale2, True),
        )
        p = tl.exp2(log2_p)
        if KIND == _FORWARD:
            d = p * (weight - slope) - tl.exp2(log2_q) * weight
        else:
            if KIND == _REVERSE:
                log2_ratio = log2_p - log2_q
            else:
                log2_ratio = -_log2_mixture(log2_p, log2_q, log2_a, log2_b)[0]
            d = p * ((log2_ratio * _LN2 - tl.load(OFFSET + row)) * weight - slope)
        y = (tl.load(TARGET + row) - start).to(tl.int32)
        if (y >= first) & (y < first + BLOCK) & (y < valid):
            d = tl.where(column == y, d + slope, d)
        tl.store(S + column, d.to(S.dtype.element_ty), mask=inside)
