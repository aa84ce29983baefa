"""Exact divergences between two models' next-token distributions over a sharded vocabulary: definition, Triton kernels,
autograd function.

With the student's p and the teacher's q, both over the whole vocabulary and tempered (arXiv 2601.20802 equation 1; the
family as in the authors' code, `alpha`):

    alpha = 1        KL(p || q), reverse KL                     d D / d z = p (log(p/q) - D)
    alpha = 0        KL(q || p), forward KL                     d D / d z = p - q
    0 < alpha < 1    (1 - alpha) KL(p || m) + alpha KL(q || m), m = (1 - alpha) p + alpha q
                                                                d D / d z = (1 - alpha) p (log(p/m) - KL(p || m))

The two ends are not the limits of the middle, which are 0. The KLs come out of the same sweep as the softmax, summed
relative to the running maxima (a sum of p (log p - log q) over raw logits has no correct digit at an offset of 1000);
the middle needs a second sweep, for which both softmaxes are known. The gradient, together with the one of a
policy-gradient term, overwrites the student's logits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdpo_megatron.kernels import divergence_triton
from sdpo_megatron.kernels.softmax import (
    GradientInPlace,
    above_max,
    differentiate,
    finish_gradient_,
    join,
    sweep_plain,
    where_active,
)
from sdpo_megatron.kernels.vocab import RowSoftmax, VocabShard

LossOfDivergence = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Any]]
"""(student logprob_U, divergence_U, teacher logprob_U) -> (loss, results); differentiated by the first two."""


@dataclass(frozen=True)
class RowDivergence:
    """What the divergence of each row is, and what its gradient needs."""

    student: RowSoftmax
    teacher: RowSoftmax
    divergence_U: Tensor
    """In nats."""
    offset_U: Tensor
    """What the gradient subtracts from log(p/q) or log(p/m): KL(p || q), or KL(p || m); unused at alpha = 0."""


def divergence_definition(
    student_logits_TV: Tensor, teacher_logits_TV: Tensor, *, alpha: float, temperature: float
) -> Tensor:
    """The divergence of each row, in nats, [T]; differentiable, from whole rows."""
    return reduced_divergence(
        (student_logits_TV / temperature).log_softmax(-1),
        (teacher_logits_TV / temperature).log_softmax(-1),
        alpha,
    )


def reduced_divergence(student_UK: Tensor, teacher_UK: Tensor, alpha: float) -> Tensor:
    """Of log-probabilities over the same K outcomes, which sum to one; an outcome of probability 0 counts as 0."""

    def kl(log_a_UK: Tensor, log_b_UK: Tensor) -> Tensor:
        a_UK = log_a_UK.exp()
        return (a_UK * (log_a_UK - log_b_UK)).where(a_UK > 0, a_UK.new_zeros(())).sum(-1)

    if alpha == 1:
        return kl(student_UK, teacher_UK)
    if alpha == 0:
        return kl(teacher_UK, student_UK)
    weights = torch.tensor([1 - alpha, alpha], dtype=student_UK.dtype, device=student_UK.device).log()
    mixture_UK = torch.logaddexp(student_UK + weights[0], teacher_UK + weights[1])
    return (1 - alpha) * kl(student_UK, mixture_UK) + alpha * kl(teacher_UK, mixture_UK)


def divergence_loss(
    student_TV: Tensor,
    teacher_TV: Tensor,
    target_T: Tensor,
    loss_of: LossOfDivergence,
    *,
    alpha: float,
    shard: VocabShard,
    active_T: Tensor | None = None,
) -> tuple[Tensor, Any, RowDivergence]:
    """A loss of divergences and of the targets' log-probabilities, its gradient written over the student's logits.

    As `softmax.policy_gradient`, with the teacher's logits beside the student's; they stay as they are.
    """
    rows = row_divergence(
        student_TV.detach(), teacher_TV, target_T, alpha=alpha, shard=shard, active_U=active_T
    )
    loss, results, slope_T, weight_T = differentiate(
        lambda logprob_T, divergence_T: loss_of(logprob_T, divergence_T, rows.teacher.logprob_U),
        rows.student.logprob_U,
        rows.divergence_U,
    )
    if student_TV.requires_grad:
        with torch.no_grad():
            write_divergence_gradient_(
                student_TV.detach(), teacher_TV, rows, target_T, weight_T, slope_T, alpha=alpha, shard=shard
            )
        loss = GradientInPlace.apply(student_TV, loss)  # type: ignore[assignment]
    return loss, results, rows


def row_divergence(
    student_UV: Tensor,
    teacher_UV: Tensor,
    target_U: Tensor,
    *,
    alpha: float,
    shard: VocabShard,
    active_U: Tensor | None = None,
) -> RowDivergence:
    """One sweep over both models' logits, and for 0 < alpha < 1 a second one, each with one all-gather."""
    on_gpu = student_UV.is_cuda
    sweep = divergence_triton.joint_sweep_triton if on_gpu else joint_sweep_plain
    parts_R9U = shard.gather(sweep(student_UV, teacher_UV, target_U, alpha == 0, shard, active_U))
    student = join(parts_R9U[:, 0:4], shard.scale, active_U)
    teacher = join(parts_R9U[:, 4:8], shard.scale, active_U)
    if alpha in (0, 1):
        kl_U = where_active(join_kl(parts_R9U, student, teacher, alpha == 0, shard.scale), active_U)
        return RowDivergence(student, teacher, kl_U, kl_U)
    mix = divergence_triton.mixture_triton if on_gpu else mixture_plain
    parts_R2U = shard.gather(mix(student_UV, teacher_UV, student, teacher, alpha, shard, active_U))
    student_kl_U, teacher_kl_U = parts_R2U.sum(0)
    return RowDivergence(student, teacher, (1 - alpha) * student_kl_U + alpha * teacher_kl_U, student_kl_U)


def join_kl(
    parts_R9U: Tensor, student: RowSoftmax, teacher: RowSoftmax, forward: bool, scale: float
) -> Tensor:
    """From sums of exp(a) (a - b) relative to each shard's own maxima."""
    a, b = (4, 0) if forward else (0, 4)
    of_a, of_b = (teacher, student) if forward else (student, teacher)
    shift_a_RU = (parts_R9U[:, a] - of_a.max_U) * scale
    shift_b_RU = (parts_R9U[:, b] - of_b.max_U) * scale
    summed_RU = parts_R9U[:, 8] + (shift_a_RU - shift_b_RU) * parts_R9U[:, a + 1]
    scaled_RU = shift_a_RU.exp()
    total_U = summed_RU.where(scaled_RU > 0, summed_RU.new_zeros(())).mul(scaled_RU).sum(0)
    return total_U / of_a.log_sum_U.exp() - of_a.log_sum_U + of_b.log_sum_U


def write_divergence_gradient_(
    student_UV: Tensor,
    teacher_UV: Tensor,
    rows: RowDivergence,
    target_U: Tensor,
    weight_U: Tensor,
    slope_U: Tensor,
    *,
    alpha: float,
    shard: VocabShard,
) -> None:
    """Overwrites the student's logits by weight dD/dz + slope (1[v = target] - p); padding columns by 0.

    Rows where both coefficients are 0 are not read."""
    run = divergence_triton.write_gradient_triton if student_UV.is_cuda else write_gradient_plain
    run(
        *(student_UV, teacher_UV, target_U, rows.student, rows.teacher, rows.offset_U),
        *(weight_U, slope_U, alpha, shard),
    )


# ---------------------------------------------------------------- plain torch


def joint_sweep_plain(
    student_UV: Tensor,
    teacher_UV: Tensor,
    target_U: Tensor,
    forward: bool,
    shard: VocabShard,
    active_U: Tensor | None = None,
) -> Tensor:
    student_4U = sweep_plain(student_UV, target_U, shard, active_U)
    teacher_4U = sweep_plain(teacher_UV, target_U, shard, active_U)
    kl_1U = torch.zeros_like(student_4U[:1])
    valid = shard.valid(student_UV.shape[1])
    index = _active_rows(active_U, len(target_U), student_UV.device)
    if valid and len(index):
        s_UV = above_max(student_UV[index, :valid], student_4U[0, index]).mul_(shard.scale)
        t_UV = above_max(teacher_UV[index, :valid], teacher_4U[0, index]).mul_(shard.scale)
        a_UV, b_UV = (t_UV, s_UV) if forward else (s_UV, t_UV)
        weight_UV = a_UV.exp()
        kl_1U[0, index] = a_UV.sub_(b_UV).mul_(weight_UV).sum(1)
    return torch.cat([student_4U, teacher_4U, kl_1U])


def _active_rows(active_U: Tensor | None, rows: int, device: torch.device) -> Any:
    if active_U is None or bool(active_U.all()):
        return torch.arange(rows, device=device)
    return active_U.nonzero()[:, 0]


def _log_probabilities(logits_UV: Tensor, softmax: RowSoftmax, scale: float) -> Tensor:
    return above_max(logits_UV, softmax.max_U).mul_(scale).sub_(softmax.log_sum_U[:, None])


def mixture_plain(
    student_UV: Tensor,
    teacher_UV: Tensor,
    student: RowSoftmax,
    teacher: RowSoftmax,
    alpha: float,
    shard: VocabShard,
    active_U: Tensor | None = None,
) -> Tensor:
    out_2U = torch.zeros(2, len(student.max_U), dtype=student.max_U.dtype, device=student_UV.device)
    valid = shard.valid(student_UV.shape[1])
    index = _active_rows(active_U, out_2U.shape[1], student_UV.device)
    if valid and len(index):
        log_p_UV, log_q_UV, log_m_UV = _mixture_logs(
            student_UV[index, :valid], teacher_UV[index, :valid], _rows(student, index), _rows(teacher, index),
            alpha, shard.scale,
        )  # fmt: skip
        out_2U[0, index] = log_p_UV.exp().mul_(log_p_UV.sub_(log_m_UV)).sum(1)
        out_2U[1, index] = log_q_UV.exp().mul_(log_q_UV.sub_(log_m_UV)).sum(1)
    return out_2U


def _rows(softmax: RowSoftmax, index: Tensor) -> RowSoftmax:
    return RowSoftmax(*(x[index] for x in vars(softmax).values()))


def _mixture_logs(
    student_UV: Tensor,
    teacher_UV: Tensor,
    student: RowSoftmax,
    teacher: RowSoftmax,
    alpha: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """log p, log q, log m."""
    log_p_UV = _log_probabilities(student_UV, student, scale)
    log_q_UV = _log_probabilities(teacher_UV, teacher, scale)
    log_weights = torch.tensor([1 - alpha, alpha], dtype=log_p_UV.dtype, device=log_p_UV.device).log()
    return log_p_UV, log_q_UV, torch.logaddexp(log_p_UV + log_weights[0], log_q_UV + log_weights[1])


def write_gradient_plain(
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
) -> None:
    valid, scale = shard.valid(student_UV.shape[1]), shard.scale
    weight_U1, slope_U1 = (weight_U * scale)[:, None], (slope_U * scale)[:, None]
    s_UV, t_UV = student_UV[:, :valid], teacher_UV[:, :valid]
    if alpha == 0:
        p_UV = _log_probabilities(s_UV, student, scale).exp_()
        q_UV = _log_probabilities(t_UV, teacher, scale).exp_()
        gradient_UV = p_UV.mul_(weight_U1 - slope_U1).sub_(q_UV.mul_(weight_U1))
    else:
        if alpha == 1:
            log_p_UV = _log_probabilities(s_UV, student, scale)
            ratio_UV = log_p_UV - _log_probabilities(t_UV, teacher, scale)
        else:
            log_p_UV, _, log_m_UV = _mixture_logs(s_UV, t_UV, student, teacher, alpha, scale)
            ratio_UV = log_p_UV - log_m_UV
            weight_U1 = weight_U1 * (1 - alpha)
        gradient_UV = ratio_UV.sub_(offset_U[:, None]).mul_(weight_U1).sub_(slope_U1)
        gradient_UV.mul_(log_p_UV.exp_())
    active_U = (weight_U != 0) | (slope_U != 0)
    finish_gradient_(student_UV, gradient_UV, target_U, slope_U * scale, active_U, shard)
