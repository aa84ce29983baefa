"""The Triton kernels of `divergence.py`; what they compute is said there, and what their arguments are in
`softmax_triton.py`.

Names inside the kernels: of the student s (its logits), p, ms (maximum), zs (sum of exponentials) and es (sum for the
entropy); of the teacher t, q, mt and zt.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdpo_megatron.kernels.rows import LogitRows, RowDivergence, RowSoftmax
from sdpo_megatron.kernels.softmax_triton import LN2, LOG2E, jit, load_logits, load_target
from sdpo_megatron.kernels.vocab import NEGATIVE

SWEEP_BLOCK, GRADIENT_BLOCK, WARPS = 2048, 2048, 4
_NEGATIVE = tl.constexpr(NEGATIVE)
_LN2 = tl.constexpr(LN2)
_LOG2E = tl.constexpr(LOG2E)
_FORWARD, _MIXTURE, _REVERSE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


def joint_sweep_triton(logits: LogitRows, forward: bool, block: int = SWEEP_BLOCK) -> Tensor:
    student_UV, teacher_UV = logits.both
    rows = len(student_UV)
    out_9U = torch.empty(9, rows, dtype=torch.float32, device=student_UV.device)
    _joint_sweep_kernel[(rows,)](
        S=student_UV,
        T=teacher_UV,
        TARGET=logits.target_U.contiguous(),
        OUT=out_9U,
        rows=rows,
        valid=logits.valid,
        start=logits.shard.start,
        stride_s=student_UV.stride(0),
        stride_t=teacher_UV.stride(0),
        scale2=logits.shard.scale * LOG2E,
        FORWARD=forward,
        BLOCK=block,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
    return out_9U


def mixture_triton(
    logits: LogitRows,
    student: RowSoftmax,
    teacher: RowSoftmax,
    alpha: float,
    block: int = SWEEP_BLOCK,
) -> Tensor:
    student_UV, teacher_UV = logits.both
    rows = len(student_UV)
    out_2U = torch.empty(2, rows, dtype=torch.float32, device=student_UV.device)
    _mixture_kernel[(rows,)](
        S=student_UV,
        T=teacher_UV,
        MAX_S=student.max_U.contiguous(),
        LOG_SUM_S=student.log_sum_U.contiguous(),
        MAX_T=teacher.max_U.contiguous(),
        LOG_SUM_T=teacher.log_sum_U.contiguous(),
        OUT=out_2U,
        rows=rows,
        valid=logits.valid,
        stride_s=student_UV.stride(0),
        stride_t=teacher_UV.stride(0),
        scale2=logits.shard.scale * LOG2E,
        log2_a=math.log2(1 - alpha),
        log2_b=math.log2(alpha),
        BLOCK=block,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
    return out_2U


def write_gradient_triton(
    logits: LogitRows,
    rows: RowDivergence,
    weight_U: Tensor,
    slope_U: Tensor,
    alpha: float,
    block: int = GRADIENT_BLOCK,
) -> None:
    student_UV, teacher_UV = logits.both
    scale = logits.shard.scale
    kind = _FORWARD if alpha == 0 else _REVERSE if alpha == 1 else _MIXTURE
    _divergence_gradient_kernel[(len(student_UV), triton.cdiv(logits.columns, block))](
        S=student_UV,
        T=teacher_UV,
        TARGET=logits.target_U.contiguous(),
        MAX_S=rows.student.max_U.contiguous(),
        LOG_SUM_S=rows.student.log_sum_U.contiguous(),
        MAX_T=rows.teacher.max_U.contiguous(),
        LOG_SUM_T=rows.teacher.log_sum_U.contiguous(),
        OFFSET=rows.offset_U.contiguous(),
        WEIGHT=(weight_U * scale * (1 - alpha if kind is _MIXTURE else 1)).contiguous(),
        SLOPE=(slope_U * scale).contiguous(),
        valid=logits.valid,
        columns=logits.columns,
        start=logits.shard.start,
        stride_s=student_UV.stride(0),
        stride_t=teacher_UV.stride(0),
        scale2=scale * LOG2E,
        log2_a=math.log2(1 - alpha) if kind is _MIXTURE else 0.0,
        log2_b=math.log2(alpha) if kind is _MIXTURE else 0.0,
        KIND=kind.value,
        BLOCK=block,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )


@jit
def _joint_step(
    S, T, column, valid, scale2, ms, mt, zs, zt, es, kl, FORWARD: tl.constexpr, MASKED: tl.constexpr
):
    """The running numbers with one more block."""
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
    S, T, TARGET, OUT, rows, valid, start, stride_s, stride_t, scale2,
    FORWARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """OUT [9, R] is in the order of `JointSums`. A program has one row.

    The teacher's entropy is not needed and stays 0."""
    row = tl.program_id(0)
    S += row.to(tl.int64) * stride_s
    T += row.to(tl.int64) * stride_t
    block = tl.arange(0, BLOCK)
    zs = tl.zeros([], tl.float32)
    zt = tl.zeros([], tl.float32)
    es = tl.zeros([], tl.float32)
    kl = tl.zeros([], tl.float32)
    ms = zs + _NEGATIVE
    mt = zs + _NEGATIVE
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
    tl.store(OUT + row, ms)
    tl.store(OUT + rows + row, zs)
    tl.store(OUT + 2 * rows + row, load_target(S, y, valid))
    tl.store(OUT + 3 * rows + row, es * _LN2)
    tl.store(OUT + 4 * rows + row, mt)
    tl.store(OUT + 5 * rows + row, zt)
    tl.store(OUT + 6 * rows + row, load_target(T, y, valid))
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

    tl.log2 would be a library's routine for any number, of 24 instructions."""
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
    """Sums every four neighbours, which are in one thread's registers: no barrier."""
    return tl.sum(tl.reshape(x, [x.shape[0] // 4, 4]), 1)


@jit
def _mixture_step(
    S, T, column, valid, ms, log2_zs, mt, log2_zt, scale2, log2_a, log2_b, student, teacher,
    MASKED: tl.constexpr,
):  # fmt: skip
    """This row's parts of KL(p || m) and KL(q || m), in bits, with one more block."""
    log2_p, log2_q = _log2_pair(S, T, column, valid, ms, log2_zs, mt, log2_zt, scale2, MASKED)
    m_over_p, m_over_q = _log2_mixture(log2_p, log2_q, log2_a, log2_b)
    student -= _partial_sums(tl.exp2(log2_p) * m_over_p)
    teacher -= _partial_sums(tl.exp2(log2_q) * m_over_q)
    return student, teacher


@jit
def _mixture_kernel(
    S, T, MAX_S, LOG_SUM_S, MAX_T, LOG_SUM_T, OUT,
    rows, valid, stride_s, stride_t, scale2, log2_a, log2_b,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """OUT [2, R]: this shard's part of KL(p || m) and KL(q || m), m = a p + b q. A program has one row."""
    row = tl.program_id(0)
    S += row.to(tl.int64) * stride_s
    T += row.to(tl.int64) * stride_t
    block = tl.arange(0, BLOCK)
    student = tl.zeros([BLOCK // 4], tl.float32)
    teacher = tl.zeros([BLOCK // 4], tl.float32)
    ms = tl.load(MAX_S + row)
    log2_zs = tl.load(LOG_SUM_S + row) * _LOG2E
    mt = tl.load(MAX_T + row)
    log2_zt = tl.load(LOG_SUM_T + row) * _LOG2E
    whole = (valid // BLOCK) * BLOCK
    for first in range(0, whole, BLOCK):
        student, teacher = _mixture_step(
            S, T, first + block, valid, ms, log2_zs, mt, log2_zt, scale2, log2_a, log2_b, student, teacher, False
        )  # fmt: skip
    if whole < valid:
        student, teacher = _mixture_step(
            S, T, whole + block, valid, ms, log2_zs, mt, log2_zt, scale2, log2_a, log2_b, student, teacher, True
        )  # fmt: skip
    tl.store(OUT + row, tl.sum(student, 0) * _LN2)
    tl.store(OUT + rows + row, tl.sum(teacher, 0) * _LN2)


@jit
def _divergence_gradient_kernel(
    S, T, TARGET, MAX_S, LOG_SUM_S, MAX_T, LOG_SUM_T, OFFSET, WEIGHT, SLOPE,
    valid, columns, start, stride_s, stride_t, scale2, log2_a, log2_b,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """S is overwritten by its gradient. WEIGHT and SLOPE carry 1 / temperature, and WEIGHT the mixture's a.

    A program has one block of one row."""
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
        ms = tl.load(MAX_S + row)
        log2_zs = tl.load(LOG_SUM_S + row) * _LOG2E
        mt = tl.load(MAX_T + row)
        log2_zt = tl.load(LOG_SUM_T + row) * _LOG2E
        log2_p, log2_q = _log2_pair(S, T, column, valid, ms, log2_zs, mt, log2_zt, scale2, True)
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
