"""Divergences on the K likeliest tokens, with all others as one more outcome or left out (arXiv 2601.20802, equation 11
and appendix A.3).

Both models' log-probabilities of the K tokens are normalised over the whole vocabulary. With `tail`, outcome K + 1 is
"any other token"; with `renormalise`, the K alone are made to sum to one, and no gradient reaches any other token.
The loss depends on the student's K log-probabilities a only, so that with f = dD/da

    d D / d logit_v = f_v [v in K] - softmax_v sum(f)

which is the policy-gradient kernel's dense part and K single entries.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sdpo_megatron.kernels.divergence import reduced_divergence
from sdpo_megatron.kernels.token_sdpo import RowSoftmax, join, sweep, write_gradient_
from sdpo_megatron.kernels.vocab import NEGATIVE, VocabShard

Rest = Literal["tail", "renormalise"]
Support = Literal["student", "teacher"]

_LARGEST_LOG_MASS = -1e-7
"""The K tokens' mass stays below one by what float32 can tell, so that the tail has a logarithm."""


@dataclass(frozen=True)
class RowTopK:
    student: RowSoftmax
    teacher: RowSoftmax
    divergence_U: Tensor
    """In nats."""
    support_UK: Tensor
    """Token ids."""
    logprobs_UK: Tensor
    """The student's, of the support."""
    slope_UK: Tensor
    """d divergence / d logprobs."""

    @property
    def mass_U(self) -> Tensor:
        """The student's probability of the support."""
        return self.logprobs_UK.exp().sum(-1)


def top_k_definition(
    student_logits_TV: Tensor,
    teacher_logits_TV: Tensor,
    *,
    alpha: float,
    k: int,
    rest: Rest,
    support: Support,
    temperature: float,
) -> Tensor:
    """The divergence of each row, in nats, [T]; differentiable by the student's logits, from whole rows."""
    student_TV = (student_logits_TV / temperature).log_softmax(-1)
    teacher_TV = (teacher_logits_TV / temperature).log_softmax(-1)
    chosen_TV = student_TV if support == "student" else teacher_TV
    support_TK = chosen_TV.detach().topk(k, dim=-1).indices
    return divergence_on_support(
        student_TV.gather(1, support_TK), teacher_TV.gather(1, support_TK), alpha, rest
    )


def divergence_on_support(student_UK: Tensor, teacher_UK: Tensor, alpha: float, rest: Rest) -> Tensor:
    """Of log-probabilities of the same K tokens."""
    return reduced_divergence(_complete(student_UK, rest), _complete(teacher_UK, rest), alpha)


def _complete(logprobs_UK: Tensor, rest: Rest) -> Tensor:
    """As log-probabilities of outcomes that sum to one."""
    log_mass_U1 = logprobs_UK.logsumexp(-1, keepdim=True)
    if rest == "renormalise":
        return logprobs_UK - log_mass_U1
    tail_U1 = (-torch.expm1(log_mass_U1.clamp(max=_LARGEST_LOG_MASS))).log()
    return torch.cat([logprobs_UK, tail_U1], dim=-1)


def row_top_k(
    student_UV: Tensor,
    teacher_UV: Tensor,
    target_U: Tensor,
    *,
    alpha: float,
    k: int,
    rest: Rest,
    support: Support,
    shard: VocabShard,
) -> RowTopK:
    """Three all-gathers of size [U] and [U, K]: softmax, support, what the other model says of it."""
    parts_R8U = shard.gather(
        torch.cat([sweep(logits, target_U, shard) for logits in (student_UV, teacher_UV)])
    )
    student, teacher = join(parts_R8U[:, :4], shard.scale), join(parts_R8U[:, 4:], shard.scale)
    chosen_UV = student_UV if support == "student" else teacher_UV
    support_UK = _likeliest(chosen_UV, k, shard)
    student_UK = logprobs_of(student_UV, support_UK, student, shard)
    teacher_UK = logprobs_of(teacher_UV, support_UK, teacher, shard)
    with torch.enable_grad():
        leaf_UK = student_UK.detach().requires_grad_()
        divergence_U = divergence_on_support(leaf_UK, teacher_UK, alpha, rest)
        (slope_UK,) = torch.autograd.grad(divergence_U.sum(), leaf_UK)
    return RowTopK(student, teacher, divergence_U.detach(), support_UK, student_UK, slope_UK)


def _likeliest(logits_UV: Tensor, k: int, shard: VocabShard) -> Tensor:
    """Ids of the k largest logits of the whole vocabulary, [U, K]: the largest of each shard's largest."""
    valid = shard.valid(logits_UV.shape[1])
    own = min(k, valid)
    values_UK = logits_UV.new_full((len(logits_UV), k), float("-inf"))  # below any token's
    ids_UK = torch.zeros_like(values_UK, dtype=torch.int64)
    if own:
        largest_UK, ids_UK[:, :own] = logits_UV[:, :valid].topk(own, dim=-1)
        values_UK[:, :own] = largest_UK.clamp_min(NEGATIVE)
    every_UK = torch.cat(shard.gather(values_UK).unbind(0), dim=-1)
    every_ids_UK = torch.cat(shard.gather(ids_UK + shard.start).unbind(0), dim=-1)
    return every_ids_UK.gather(1, every_UK.topk(k, dim=-1).indices)


def logprobs_of(logits_UV: Tensor, ids_UK: Tensor, softmax: RowSoftmax, shard: VocabShard) -> Tensor:
    """Log-probabilities of tokens of the whole vocabulary, wherever their columns are, [U, K]."""
    local_UK, here_UK = shard.own(ids_UK, logits_UV.shape[1])
    logits_UK = logits_UV.gather(1, local_UK).to(softmax.max_U.dtype).clamp_min(NEGATIVE)
    logits_UK = shard.gather(logits_UK.where(here_UK, logits_UK.new_zeros(()))).sum(0)
    return (logits_UK - softmax.max_U[:, None]) * shard.scale - softmax.log_sum_U[:, None]


def write_top_k_gradient_(
    student_UV: Tensor, rows: RowTopK, target_U: Tensor, weight_U: Tensor, slope_U: Tensor, shard: VocabShard
) -> None:
    """Overwrites the student's logits by weight dD/dz + slope (1[v = target] - p); padding columns by 0."""
    f_UK = weight_U[:, None] * rows.slope_UK
    dense_U = slope_U + f_UK.sum(-1)
    write_gradient_(student_UV, rows.student, target_U, dense_U, slope_U, shard)
    hot_UK = slope_U[:, None] * (rows.support_UK == target_U[:, None])
    entry_UK = (f_UK + hot_UK - rows.logprobs_UK.exp() * dense_U[:, None]) * shard.scale
    local_UK, here_UK = shard.own(rows.support_UK, student_UV.shape[1])
    row, place = here_UK.nonzero(as_tuple=True)
    student_UV[row, local_UK[row, place]] = entry_UK[row, place].to(student_UV.dtype)
