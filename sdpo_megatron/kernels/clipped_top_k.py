"""PPO's surrogate of reverse KL over the policy's K likeliest tokens and all others as one outcome (arXiv 2601.20802,
equations 12 and 13), for a policy that has moved since it sampled:

    - sum over outcomes v of o(v) min(w(v) A(v), clip(w(v), 1 - low, 1 + high) A(v)),
    o = pi_old,   w = pi / pi_old,   A = log q - log pi, held constant

The K are o's likeliest. Without old logits o is the student's own present distribution: w is 1, and value and gradient
are reverse KL's over the same outcomes. All three models are normalised over the whole vocabulary, and no more of them
is read than for `top_k.py`, whose gradient this shares.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sdpo_megatron.kernels.rows import LogitRows
from sdpo_megatron.kernels.top_k import (
    RowTopK,
    likeliest,
    outcomes_of,
    outcomes_of_rows,
    write_top_k_gradient_,
)


def clipped_top_k_definition(
    student_logits_TV: Tensor,
    teacher_logits_TV: Tensor,
    old_logits_TV: Tensor,
    *,
    k: int,
    clip_low: float,
    clip_high: float,
    temperature: float,
) -> Tensor:
    """Returns the surrogate of each row, in nats, [T], from whole rows; it is differentiable by the student's
    logits."""
    models = (student_logits_TV, teacher_logits_TV, old_logits_TV)
    student_TV, teacher_TV, old_TV = ((x_TV / temperature).log_softmax(-1) for x_TV in models)
    support_TK = old_TV.detach().topk(k, dim=-1).indices
    student_TJ, teacher_TJ, old_TJ = (
        outcomes_of(x_TV, support_TK) for x_TV in (student_TV, teacher_TV, old_TV)
    )
    return clipped_surrogate(student_TJ, teacher_TJ, old_TJ, clip_low, clip_high)


def clipped_surrogate(
    student_UJ: Tensor, teacher_UJ: Tensor, old_UJ: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """Returns the surrogate of each row from the models' log-probabilities of the same outcomes; an outcome that was
    never sampled counts as 0."""
    old_UJ, teacher_UJ = old_UJ.detach(), teacher_UJ.detach()
    probability_UJ = old_UJ.exp()
    sampled_UJ = probability_UJ > 0
    zeros_UJ = torch.zeros_like(old_UJ)
    advantage_UJ = (teacher_UJ - student_UJ.detach()).where(sampled_UJ, zeros_UJ)
    ratio_UJ = (student_UJ - old_UJ).where(sampled_UJ, zeros_UJ).exp()
    clipped_UJ = ratio_UJ.clamp(1 - clip_low, 1 + clip_high)
    gain_UJ = torch.minimum(ratio_UJ * advantage_UJ, clipped_UJ * advantage_UJ)
    return -(probability_UJ * gain_UJ).sum(-1)


@dataclass(frozen=True)
class ClippedTopK:
    """PPO's surrogate of reverse KL over the `k` tokens that the policy before this batch found likeliest, and the
    rest as one outcome."""

    k: int
    clip_low: float
    clip_high: float

    def evaluate(self, logits: LogitRows) -> RowTopK:
        """Does for the surrogate what `TopK.evaluate` does; `logits.old_UV` are the logits of the policy that sampled,
        None for the student's own."""
        models = [*logits.both] if logits.old_UV is None else [*logits.both, logits.old_UV]
        support_UK = likeliest(models[0] if logits.old_UV is None else logits.old_UV, self.k, logits.shard)
        student, teacher, *old = outcomes_of_rows(models, support_UK, logits)
        old_UJ = old[0].logprobs_UJ if old else student.logprobs_UJ
        return RowTopK.of(
            student,
            teacher,
            support_UK,
            lambda student_UJ: clipped_surrogate(
                student_UJ, teacher.logprobs_UJ, old_UJ, self.clip_low, self.clip_high
            ),
        )

    def write_gradient_(self, logits: LogitRows, rows: RowTopK, weight_U: Tensor, slope_U: Tensor) -> None:
        write_top_k_gradient_(logits, rows, weight_U, slope_U)
