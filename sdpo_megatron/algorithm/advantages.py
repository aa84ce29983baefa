"""Advantages: how much better a token is than the policy's own choice, as the teacher (SDPO) or the reward (GRPO)
judges."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

# checking a configuration imports this file, and should not wait seconds for torch
if TYPE_CHECKING:
    from torch import Tensor


def sdpo_advantages(
    teacher_logprobs_T: "Tensor", student_logprobs_T: "Tensor", has_teacher_T: "Tensor"
) -> "Tensor":
    """Returns `teacher - student` in nats for each sampled token; 0 where `has_teacher_T` is false, whatever the
    teacher says.

    All three arguments are [T]; the result carries no gradient (arXiv 2601.20802, token-level form of proposition 2.1).
    """
    difference_T = (teacher_logprobs_T - student_logprobs_T).detach()
    return difference_T.where(has_teacher_T.bool(), difference_T.new_zeros(()))


def group_advantages(rewards_PG: Sequence[Sequence[float]]) -> list[list[float]]:
    """Returns each reward minus the mean reward of its group, not divided by the standard deviation (arXiv
    2503.20783)."""
    return [[reward - sum(rewards_G) / len(rewards_G) for reward in rewards_G] for rewards_G in rewards_PG]
