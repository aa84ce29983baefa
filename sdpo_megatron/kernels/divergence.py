"""Exact divergences between two models' next-token distributions over a sharded vocabulary: definition and plain
torch.

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

from dataclasses import dataclass

import torch
from torch import Tensor

from sdpo_megatron.kernels import divergence_triton
from sdpo_megatron.kernels.rows import JointSums, LogitRows, RowDivergence, RowSoftmax
from sdpo_megatron.kernels.softmax import above_max, join, put_gradient_, sweep_plain


def divergence_definition(
    student_logits_TV: Tensor, teacher_logits_TV: Tensor, *, alpha: float, temperature: float
) -> Tensor:
    """Returns the divergence of each row, in nats, [T], from whole rows; it is differentiable."""
    return reduced_divergence(
        (student_logits_TV / temperature).log_softmax(-1),
        (teacher_logits_TV / temperature).log_softmax(-1),
        alpha,
    )


def reduced_divergence(student_UK: Tensor, teacher_UK: Tensor, alpha: float) -> Tensor:
    """Returns the divergence of each row from log-probabilities over the same K outcomes, which sum to one; an outcome
    of probability 0 counts as 0."""

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


@dataclass(frozen=True)
class FullVocabulary:
    """The divergence of the next-token distributions over the whole vocabulary."""

    alpha: float

    def evaluate(self, logits: LogitRows) -> RowDivergence:
        """Takes one sweep over both models' logits, and for 0 < alpha < 1 a second one, each with one all-gather."""
        on_gpu, shard, alpha = logits.student_UV.is_cuda, logits.shard, self.alpha
        sweep = divergence_triton.joint_sweep_triton if on_gpu else joint_sweep_plain
        sums = JointSums.unstack(shard.gather(sweep(logits, forward=alpha == 0)))
        student, teacher = join(sums.student, shard.scale), join(sums.teacher, shard.scale)
        if alpha in (0, 1):
            kl_U = offset_U = _join_kl(sums, student, teacher, forward=alpha == 0, scale=shard.scale)
        else:
            mix = divergence_triton.mixture_triton if on_gpu else mixture_plain
            offset_U, teacher_kl_U = shard.gather(mix(logits, student, teacher, alpha)).sum(0)
            kl_U = (1 - alpha) * offset_U + alpha * teacher_kl_U
        return RowDivergence(student=student, teacher=teacher, divergence_U=kl_U, offset_U=offset_U)

    def write_gradient_(
        self, logits: LogitRows, rows: RowDivergence, weight_U: Tensor, slope_U: Tensor
    ) -> None:
        """Overwrites the student's logits by weight dD/dz + slope (1[v = target] - p), and padding columns by 0.

        Rows where both coefficients are 0 are not read."""
        on_gpu = logits.student_UV.is_cuda
        run = divergence_triton.write_gradient_triton if on_gpu else write_gradient_plain
        run(logits, rows, weight_U, slope_U, self.alpha)


def _join_kl(
    sums: JointSums, student: RowSoftmax, teacher: RowSoftmax, *, forward: bool, scale: float
) -> Tensor:
    """KL(a || b) over all shards; a is the student, or with `forward` the teacher."""
    if forward:
        a, b, sums_a, sums_b = teacher, student, sums.teacher, sums.student
    else:
        a, b, sums_a, sums_b = student, teacher, sums.student, sums.teacher
    shift_a_RU = (sums_a.max_RU - a.max_U) * scale
    shift_b_RU = (sums_b.max_RU - b.max_U) * scale
    summed_RU = sums.kl_sum_RU + (shift_a_RU - shift_b_RU) * sums_a.exp_sum_RU
    total_U = (summed_RU * shift_a_RU.exp()).sum(0)
    return total_U / a.log_sum_U.exp() - a.log_sum_U + b.log_sum_U


# ---------------------------------------------------------------- plain torch


def joint_sweep_plain(logits: LogitRows, forward: bool) -> Tensor:
    """Returns the sums of this rank's shard, stacked in the order of `JointSums`, [9, U]; the KL is KL(q || p) if
    `forward`."""
    student_UV, teacher_UV = logits.both
    student_4U = sweep_plain(student_UV, logits.target_U, logits.shard)
    teacher_4U = sweep_plain(teacher_UV, logits.target_U, logits.shard)
    s_UV = above_max(student_UV[:, : logits.valid], student_4U[0]).mul_(logits.shard.scale)
    t_UV = above_max(teacher_UV[:, : logits.valid], teacher_4U[0]).mul_(logits.shard.scale)
    a_UV, b_UV = (t_UV, s_UV) if forward else (s_UV, t_UV)
    weight_UV = a_UV.exp()
    kl_sum_U = a_UV.sub_(b_UV).mul_(weight_UV).sum(1)
    return torch.cat([student_4U, teacher_4U, kl_sum_U[None]])


def mixture_plain(logits: LogitRows, student: RowSoftmax, teacher: RowSoftmax, alpha: float) -> Tensor:
    """Returns the parts of KL(p || m) and of KL(q || m) that this rank's shard has, [2, U]."""
    log_p_UV, log_q_UV, log_m_UV = _mixture_logs(logits, student, teacher, alpha)
    student_U = log_p_UV.exp().mul_(log_p_UV.sub_(log_m_UV)).sum(1)
    teacher_U = log_q_UV.exp().mul_(log_q_UV.sub_(log_m_UV)).sum(1)
    return torch.stack([student_U, teacher_U])


def _log_probabilities(logits: LogitRows, student: RowSoftmax, teacher: RowSoftmax) -> tuple[Tensor, Tensor]:
    """log p and log q of the columns that are no padding."""
    log_p_UV, log_q_UV = (
        above_max(logits_UV[:, : logits.valid], softmax.max_U)
        .mul_(logits.shard.scale)
        .sub_(softmax.log_sum_U[:, None])
        for logits_UV, softmax in zip(logits.both, (student, teacher), strict=True)
    )
    return log_p_UV, log_q_UV


def _mixture_logs(
    logits: LogitRows, student: RowSoftmax, teacher: RowSoftmax, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    """log p, log q, log m."""
    log_p_UV, log_q_UV = _log_probabilities(logits, student, teacher)
    log_weights = torch.tensor([1 - alpha, alpha], dtype=log_p_UV.dtype, device=log_p_UV.device).log()
    return log_p_UV, log_q_UV, torch.logaddexp(log_p_UV + log_weights[0], log_q_UV + log_weights[1])


def write_gradient_plain(
    logits: LogitRows, rows: RowDivergence, weight_U: Tensor, slope_U: Tensor, alpha: float
) -> None:
    scale = logits.shard.scale
    weight_U1, slope_U1 = (weight_U * scale)[:, None], (slope_U * scale)[:, None]
    if alpha == 0:
        log_p_UV, log_q_UV = _log_probabilities(logits, rows.student, rows.teacher)
        gradient_UV = log_p_UV.exp_().mul_(weight_U1 - slope_U1).sub_(log_q_UV.exp_().mul_(weight_U1))
    else:
        if alpha == 1:
            log_p_UV, log_q_UV = _log_probabilities(logits, rows.student, rows.teacher)
            ratio_UV = log_p_UV - log_q_UV
        else:
            log_p_UV, _, log_m_UV = _mixture_logs(logits, rows.student, rows.teacher, alpha)
            ratio_UV = log_p_UV - log_m_UV
            weight_U1 = weight_U1 * (1 - alpha)
        gradient_UV = ratio_UV.sub_(rows.offset_U[:, None]).mul_(weight_U1).sub_(slope_U1)
        gradient_UV.mul_(log_p_UV.exp_())
    gradient_UV[(weight_U == 0) & (slope_U == 0)] = 0.0
    put_gradient_(logits.student_UV, gradient_UV, logits.target_U, slope_U * scale, logits.shard)
