"""Divergences on the K likeliest tokens, with all others as one more outcome or left out (arXiv 2601.20802, equation 11
and appendix A.3).

Both models' log-probabilities of the K tokens are normalised over the whole vocabulary. With `tail`, outcome K + 1 is
"any other token"; with `renormalise`, the K alone are made to sum to one, and no gradient reaches any other token.
The loss depends on the student's K + 1 log-probabilities a only, so that with f = dD/da, the student's p, its tail's
probability p_tail and its softmax t of the tail's tokens alone (p_v = p_tail t_v)

    d D / d logit_v = f_v - p_v sum(f)                    for v in K
                      t_v (f_tail - p_tail sum(f))        for v outside K

which are K single entries, and the policy-gradient kernel's dense part for the tail's softmax.

One minus the mass of the K has no digits where they have nearly all of it. The sweeps therefore run over the tail
alone: the K logits are minus infinity meanwhile. What they say of it is joined with the K logits as shards are joined,
and gives the whole softmax; no pass over the logits is added.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sdpo_megatron.kernels.divergence import reduced_divergence
from sdpo_megatron.kernels.rows import LogitRows, RowNumbers, RowSoftmax, ShardSums
from sdpo_megatron.kernels.softmax import join, sweep, write_gradient_
from sdpo_megatron.kernels.vocab import NEGATIVE, VocabShard

Rest = Literal["tail", "renormalise"]
Support = Literal["student", "teacher"]


@dataclass(frozen=True, kw_only=True)
class RowTopK(RowNumbers):
    """The divergence of each row on its support, and what its gradient needs."""

    divergence_U: Tensor
    support_UK: Tensor
    """Token ids of the K likeliest tokens."""
    tail: RowSoftmax
    """The student's softmax of all other tokens alone."""
    logprobs_UJ: Tensor
    """The student's log-probabilities of the support and, last, of any other token."""
    slope_UJ: Tensor
    """The derivative of the divergence by `logprobs_UJ`."""

    @classmethod
    def of(
        cls,
        student: "RowOutcomes",
        teacher: "RowOutcomes",
        support_UK: Tensor,
        divergence_of: Callable[[Tensor], Tensor],
    ) -> "RowTopK":
        """`divergence_of` gives the divergence [U] of the student's logprobs_UJ; it is differentiated here."""
        with torch.enable_grad():
            leaf_UJ = student.logprobs_UJ.detach().requires_grad_()
            divergence_U = divergence_of(leaf_UJ)
            (slope_UJ,) = torch.autograd.grad(divergence_U.sum(), leaf_UJ)
        return cls(
            student=student.whole,
            teacher=teacher.whole,
            divergence_U=divergence_U.detach(),
            mass_U=student.logprobs_UJ[:, :-1].exp().sum(-1),
            support_UK=support_UK,
            tail=student.tail,
            logprobs_UJ=student.logprobs_UJ,
            slope_UJ=slope_UJ,
        )


class RowOutcomes(NamedTuple):
    """What one model says of each row."""

    whole: RowSoftmax
    tail: RowSoftmax
    """The softmax of all tokens outside the support alone."""
    logprobs_UJ: Tensor
    """Log-probabilities of the support and, last, of any other token."""


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
    """Returns the divergence of each row, in nats, [T], from whole rows; it is differentiable by the student's
    logits."""
    student_TV = (student_logits_TV / temperature).log_softmax(-1)
    teacher_TV = (teacher_logits_TV / temperature).log_softmax(-1)
    chosen_TV = student_TV if support == "student" else teacher_TV
    support_TK = chosen_TV.detach().topk(k, dim=-1).indices
    student_TJ, teacher_TJ = outcomes_of(student_TV, support_TK), outcomes_of(teacher_TV, support_TK)
    return divergence_of_outcomes(student_TJ, teacher_TJ, alpha, rest)


def outcomes_of(logprobs_TV: Tensor, support_TK: Tensor) -> Tensor:
    """Returns log-probabilities of the support and, last, of any other token, [T, J], from whole rows."""
    inside_TV = torch.zeros_like(logprobs_TV, dtype=torch.bool).scatter(1, support_TK, True)
    tail_T1 = logprobs_TV.masked_fill(inside_TV, NEGATIVE).logsumexp(-1, keepdim=True)
    return torch.cat([logprobs_TV.gather(1, support_TK), tail_T1], dim=-1)


def divergence_of_outcomes(student_UJ: Tensor, teacher_UJ: Tensor, alpha: float, rest: Rest) -> Tensor:
    """Returns the divergence of each row from log-probabilities of the same K tokens and, last, of any other token,
    which `renormalise` leaves out."""
    if rest == "renormalise":
        student_UJ, teacher_UJ = (x_UJ[:, :-1].log_softmax(-1) for x_UJ in (student_UJ, teacher_UJ))
    return reduced_divergence(student_UJ, teacher_UJ, alpha)


@dataclass(frozen=True)
class TopK:
    """The divergence over the `k` tokens that the model `support` finds likeliest, and the rest."""

    alpha: float
    k: int
    rest: Rest
    support: Support

    def evaluate(self, logits: LogitRows) -> RowTopK:
        """Finds the support, and what both models say of it and of all other tokens, by all-gathers of size [U] and
        [U, K].

        Writes over the support's logits of both models and puts them back: to the caller they stay as they are."""
        models = logits.both
        support_UK = likeliest(models[0] if self.support == "student" else models[1], self.k, logits.shard)
        student, teacher = outcomes_of_rows(models, support_UK, logits)
        return RowTopK.of(
            student,
            teacher,
            support_UK,
            lambda student_UJ: divergence_of_outcomes(student_UJ, teacher.logprobs_UJ, self.alpha, self.rest),
        )

    def write_gradient_(self, logits: LogitRows, rows: RowTopK, weight_U: Tensor, slope_U: Tensor) -> None:
        write_top_k_gradient_(logits, rows, weight_U, slope_U)


def outcomes_of_rows(models: Sequence[Tensor], support_UK: Tensor, logits: LogitRows) -> list[RowOutcomes]:
    """Returns the outcomes of each model's logits [U, V], with two all-gathers for all of them; the logits stay as they
    are."""
    shard, target_U = logits.shard, logits.target_U
    hit_UK = support_UK == target_U[:, None]
    own = torch.stack([_own_logits(x_UV, support_UK, shard) for x_UV in models])
    logits_of_models = shard.gather(own).sum(0)
    sums = shard.gather(torch.cat([_sweep_others(x_UV, support_UK, target_U, shard) for x_UV in models]))
    tails = [ShardSums.unstack(sums_R4U) for sums_R4U in sums.split(4, dim=1)]
    return [
        _outcomes(tail, logits_UK, hit_UK, shard.scale)
        for tail, logits_UK in zip(tails, logits_of_models, strict=True)
    ]


def likeliest(logits_UV: Tensor, k: int, shard: VocabShard) -> Tensor:
    """Returns the ids of the k largest logits of the whole vocabulary, [U, K]: the largest of each shard's largest."""
    valid = shard.valid(logits_UV.shape[1])
    own = min(k, valid)
    # below any token's
    values_UK = logits_UV.new_full((len(logits_UV), k), float("-inf"))
    ids_UK = torch.zeros_like(values_UK, dtype=torch.int64)
    if own:
        largest_UK, ids_UK[:, :own] = logits_UV[:, :valid].topk(own, dim=-1)
        values_UK[:, :own] = largest_UK.clamp_min(NEGATIVE)
    every_UK = torch.cat(shard.gather(values_UK).unbind(0), dim=-1)
    every_ids_UK = torch.cat(shard.gather(ids_UK + shard.start).unbind(0), dim=-1)
    return every_ids_UK.gather(1, every_UK.topk(k, dim=-1).indices)


def _own_logits(logits_UV: Tensor, ids_UK: Tensor, shard: VocabShard) -> Tensor:
    """Logits of tokens of the whole vocabulary, [U, K], in the type to compute with; 0 for other ranks' tokens."""
    local_UK, here_UK = shard.own(ids_UK, logits_UV.shape[1])
    wide = torch.promote_types(logits_UV.dtype, torch.float32)
    logits_UK = logits_UV.gather(1, local_UK).to(wide).clamp_min(NEGATIVE)
    return logits_UK.where(here_UK, logits_UK.new_zeros(()))


def _sweep_others(logits_UV: Tensor, support_UK: Tensor, target_U: Tensor, shard: VocabShard) -> Tensor:
    """`sweep` over the tail: the support's logits are minus infinity while it runs."""
    row, column, _ = _own_places(support_UK, logits_UV.shape[1], shard)
    kept = logits_UV[row, column]
    logits_UV[row, column] = float("-inf")
    sums_4U = sweep(logits_UV, target_U, shard)
    logits_UV[row, column] = kept
    return sums_4U


def _own_places(ids_UK: Tensor, columns: int, shard: VocabShard) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column and place among the K of each entry whose column this rank has."""
    local_UK, here_UK = shard.own(ids_UK, columns)
    row, place = here_UK.nonzero(as_tuple=True)
    return row, local_UK[row, place], place


def _outcomes(sums: ShardSums, logits_UK: Tensor, hit_UK: Tensor, scale: float) -> RowOutcomes:
    """The sums are of the tail; of a target in the support they say NEGATIVE, and the support's sums its logit."""
    sums = sums._replace(target_RU=sums.target_RU.masked_fill(hit_UK.any(-1), 0.0))
    tail = join(sums, scale)
    of_support = _sums_of_support(logits_UK, hit_UK, scale)
    whole = join(ShardSums.unstack(torch.cat([sums.stack(), of_support.stack()])), scale)
    logprobs_UK = (logits_UK - whole.max_U[:, None]) * scale - whole.log_sum_U[:, None]
    tail_U = (tail.max_U - whole.max_U) * scale + (tail.log_sum_U - whole.log_sum_U)
    return RowOutcomes(whole, tail, torch.cat([logprobs_UK, tail_U[:, None]], dim=-1))


def _sums_of_support(logits_UK: Tensor, hit_UK: Tensor, scale: float) -> ShardSums:
    """What `sweep` would say of the support alone, as if it were one more shard."""
    max_U = logits_UK.amax(-1)
    above_UK = (logits_UK - max_U[:, None]) * scale
    exp_UK = above_UK.exp()
    target_U = logits_UK.where(hit_UK, logits_UK.new_zeros(())).sum(-1)
    return ShardSums(
        max_RU=max_U[None],
        exp_sum_RU=exp_UK.sum(-1)[None],
        target_RU=target_U[None],
        entropy_sum_RU=(above_UK * exp_UK).sum(-1)[None],
    )


def write_top_k_gradient_(logits: LogitRows, rows: RowTopK, weight_U: Tensor, slope_U: Tensor) -> None:
    """Overwrites the student's logits by weight dD/dz + slope (1[v = target] - p), and padding columns by 0.

    In a tail of no tokens p and f are 0, or the divergence is infinite: no gradient reaches it."""
    student_UV, target_U, shard = logits.student_UV, logits.target_U, logits.shard
    hot_UK = slope_U[:, None] * (rows.support_UK == target_U[:, None])
    f_UJ, p_UJ = weight_U[:, None] * rows.slope_UJ, rows.logprobs_UJ.exp()
    sum_U = slope_U + f_UJ.sum(-1)
    dense_U = (p_UJ[:, -1] * sum_U - f_UJ[:, -1]).where(rows.tail.max_U > NEGATIVE, sum_U.new_zeros(()))
    row, column, place = _own_places(rows.support_UK, student_UV.shape[1], shard)
    # beside the tail's maximum they would overflow
    student_UV[row, column] = float("-inf")
    write_gradient_(student_UV, rows.tail, target_U, dense_U, slope_U, shard)
    entry_UK = (f_UJ[:, :-1] + hot_UK - p_UJ[:, :-1] * sum_U[:, None]) * shard.scale
    student_UV[row, column] = entry_UK[row, place].to(student_UV.dtype)
