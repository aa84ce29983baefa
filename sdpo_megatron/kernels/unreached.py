"""How much of the teacher's probability lies on tokens that the student hardly ever samples, of each row: definition,
and plain torch for any device.

    sum over v of q(v) where p(v) < floor

Which tokens these are is known once both softmaxes are, so it takes a pass over both models' logits of its own, and
one all-gather of a number a row. It is asked for in steps in which the teacher is examined, and not otherwise: no
kernel of ours is worth its while.
"""

import math

import torch
from torch import Tensor

from sdpo_megatron.kernels.rows import LogitRows, RowSoftmax
from sdpo_megatron.kernels.softmax import above_max

_ROWS = 64
"""Rows that are in work at a time: nothing of all logits' size is allocated."""


def unreached_definition(
    student_logits_TV: Tensor, teacher_logits_TV: Tensor, *, floor: float, temperature: float
) -> Tensor:
    """Returns of each row the teacher's probability of all tokens to which the student gives less than `floor`, [T],
    from whole rows."""
    student_TV = (student_logits_TV / temperature).softmax(-1)
    teacher_TV = (teacher_logits_TV / temperature).softmax(-1)
    return teacher_TV.where(student_TV < floor, teacher_TV.new_zeros(())).sum(-1)


@torch.no_grad()
def row_unreached(logits: LogitRows, student: RowSoftmax, teacher: RowSoftmax, floor: float) -> Tensor:
    """Returns the same, [U], equal on all ranks that share the vocabulary; float32, or float64 for such logits."""
    student_UV, teacher_UV = (logits_UV[:, : logits.valid] for logits_UV in logits.both)
    scale, log_floor_U = logits.shard.scale, student.log_sum_U + math.log(floor)
    own_U = torch.zeros_like(teacher.log_sum_U)
    for start in range(0, len(student_UV), _ROWS):
        rows = slice(start, start + _ROWS)
        reached_UV = above_max(student_UV[rows], student.max_U[rows]).mul_(scale) >= log_floor_U[rows, None]
        share_UV = above_max(teacher_UV[rows], teacher.max_U[rows]).mul_(scale)
        share_UV.sub_(teacher.log_sum_U[rows, None]).exp_()
        own_U[rows] = share_UV.masked_fill_(reached_UV, 0.0).sum(1)
    return logits.shard.gather(own_U).sum(0)
