"""What ranks run: every objective over a vocabulary that they share, from hidden states, against float64."""

from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sdpo_megatron.kernels.from_hidden import HiddenPart, loss_from_hidden
from sdpo_megatron.kernels.objective import (
    Examined,
    FullVocabulary,
    Objective,
    TokenLevel,
    TopK,
)
from sdpo_megatron.kernels.rows import RowNumbers
from sdpo_megatron.kernels.unreached import unreached_definition
from sdpo_megatron.kernels.vocab import VocabShard
from tests.unit.kernels import oracles
from tests.unit.kernels.oracles import Array

VOCABULARY, HIDDEN, ROWS, TEACHER_ROWS, TEMPERATURE = 211, 16, 23, 31, 0.8
OBJECTIVES: dict[str, Objective] = {"token level": TokenLevel()}
OBJECTIVES |= {f"alpha {alpha}": FullVocabulary(alpha) for alpha in (0.0, 0.3, 0.5, 1.0)}
OBJECTIVES |= {
    f"top {k}, {rest}, {support}, alpha {alpha}": TopK(alpha, k, rest, support)
    for k, alpha in ((20, 0.0), (20, 1.0), (100, 0.5))  # with 3 ranks no shard has 100 columns
    for rest in ("tail", "renormalise")
    for support in ("student", "teacher")
}
FLOOR = 1e-3
OBJECTIVES["examined"] = Examined(FullVocabulary(1.0), FLOOR)


class Teacher(NamedTuple):
    share: float
    hidden_RD: Tensor
    head_VD: Tensor
    row_U: Tensor


class Problem(NamedTuple):
    """The same on all ranks, in float32, the vocabulary whole."""

    hidden_UD: Tensor
    head_VD: Tensor
    teachers: list[Teacher]
    target_U: Tensor
    weight_U: Tensor
    slope_U: Tensor


def compare() -> dict[str, float]:
    """Values and gradients of this rank's shard equal the oracle's; the losses, by objective, teachers and chunks."""
    dist.init_process_group("gloo")
    of = _problem()
    losses: dict[str, float] = {}
    for name, objective in OBJECTIVES.items():
        for teachers in (of.teachers[:1], of.teachers):
            shares = [1.0] if len(teachers) == 1 else [0.99, 0.01]
            taught = of._replace(
                teachers=[t._replace(share=s) for t, s in zip(teachers, shares, strict=True)]
            )
            expected = _expected(taught, objective)
            for chunk_tokens in (7, 1000):
                label = f"{name}, {len(teachers)} teachers, chunks of {chunk_tokens}"
                losses[label] = _holds(label, taught, objective, chunk_tokens, expected)
    return losses


def _problem() -> Problem:
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    head_VD = 0.4 * random(VOCABULARY, HIDDEN)
    teachers = [
        Teacher(
            1.0,
            random(TEACHER_ROWS, HIDDEN),
            head_VD + 0.1 * random(VOCABULARY, HIDDEN),
            torch.randint(TEACHER_ROWS, (ROWS,), generator=generator),
        )
        for _ in range(2)
    ]
    target_U = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    weight_U, slope_U = torch.rand(2, ROWS, generator=generator) - 0.3
    return Problem(random(ROWS, HIDDEN), head_VD, teachers, target_U, weight_U, slope_U)


def _holds(
    label: str,
    of: Problem,
    objective: Objective,
    chunk_tokens: int,
    expected: tuple[float, Array, Array],
) -> float:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    columns = -(-VOCABULARY // ranks) + 1  # one more than needed: padding wherever the vocabulary ends
    hidden_UD = of.hidden_UD.clone().requires_grad_()
    head_VD = _own(of.head_VD, columns).requires_grad_()
    parts = [t._replace(head_VD=_own(t.head_VD, columns)) for t in of.teachers]

    def loss_of(rows: slice, logprob_U: Tensor, divergence_U: Tensor, numbers: RowNumbers) -> Tensor:
        assert (numbers.unreached_U is not None) == isinstance(objective, Examined)
        if numbers.unreached_U is not None:
            _close(f"{label}: unreached", numbers.unreached_U, _unreached(of)[rows], 1.0)
        return (of.weight_U[rows] * divergence_U + of.slope_U[rows] * logprob_U).sum()

    loss = loss_from_hidden(
        *(hidden_UD, head_VD, [HiddenPart(*part) for part in parts], of.target_U, loss_of),
        objective=objective,
        shard=VocabShard(
            start=rank * columns,
            vocab_size=VOCABULARY,
            group=dist.group.WORLD if ranks > 1 else None,
            temperature=TEMPERATURE,
        ),
        chunk_tokens=chunk_tokens,
    )
    loss.backward()
    assert hidden_UD.grad is not None and head_VD.grad is not None
    dist.all_reduce(hidden_UD.grad)  # as megatron does where hidden states enter the tensor-parallel region

    expected_loss, hidden_grad_UD, head_grad_VD = expected
    padded_VD = np.zeros((columns * ranks, HIDDEN))
    padded_VD[:VOCABULARY] = head_grad_VD
    own_VD = padded_VD[rank * columns : (rank + 1) * columns]
    _close(f"{label}: loss", loss.detach(), np.array(expected_loss), abs(expected_loss))
    _close(f"{label}: hidden states", hidden_UD.grad, hidden_grad_UD, np.abs(hidden_grad_UD).max())
    _close(f"{label}: head", head_VD.grad, own_VD, np.abs(head_grad_VD).max())
    return loss.item()


def _own(head_VD: Tensor, columns: int) -> Tensor:
    """This rank's rows of a head whose padding holds garbage."""
    ranks = dist.get_world_size()
    garbage_VD = torch.full((columns * ranks - VOCABULARY, HIDDEN), 1000.0)
    return torch.cat([head_VD, garbage_VD]).chunk(ranks)[dist.get_rank()].clone()


def _close(label: str, actual: Tensor, expected: Array, largest: float) -> None:
    error = np.abs(actual.double().numpy() - expected).max()
    assert error <= 5e-6 * largest, f"{label}: error {error}, of at most {largest}"


def _logits(of: Problem) -> tuple[Array, Array]:
    """The student's and the teacher's, in float64."""
    hidden_UD, head_VD = of.hidden_UD.double().numpy(), of.head_VD.double().numpy()
    student_UV, teacher_UV = hidden_UD @ head_VD.T, np.zeros((ROWS, VOCABULARY))
    for teacher in of.teachers:
        rows_UD = teacher.hidden_RD.double().numpy()[teacher.row_U.numpy()]
        teacher_UV += teacher.share * (rows_UD @ teacher.head_VD.double().numpy().T)
    return student_UV, teacher_UV


def _unreached(of: Problem) -> Array:
    student_UV, teacher_UV = (torch.from_numpy(logits_UV) for logits_UV in _logits(of))
    share_U = unreached_definition(student_UV, teacher_UV, floor=FLOOR, temperature=TEMPERATURE).numpy()
    assert share_U.min() < 0.3 and share_U.max() > 0.8
    return share_U


def _expected(of: Problem, objective: Objective) -> tuple[float, Array, Array]:
    """(loss, gradient by hidden states, gradient by the head) in float64."""
    hidden_UD, head_VD = of.hidden_UD.double().numpy(), of.head_VD.double().numpy()
    student_UV, teacher_UV = _logits(of)
    objective = objective.objective if isinstance(objective, Examined) else objective
    logprob = oracles.logprob(student_UV, of.target_U.numpy(), TEMPERATURE)
    slope_U, weight_U = of.slope_U.double().numpy(), of.weight_U.double().numpy()
    loss, gradient_UV = (slope_U * logprob.value_T).sum(), slope_U[:, None] * logprob.gradient_TV
    if isinstance(objective, FullVocabulary | TopK):
        divergence = oracles.of_objective(student_UV, teacher_UV, objective, TEMPERATURE)
        loss += (weight_U * divergence.value_T).sum()
        gradient_UV = gradient_UV + weight_U[:, None] * divergence.gradient_TV
    return float(loss), gradient_UV @ head_VD, gradient_UV.T @ hidden_UD
