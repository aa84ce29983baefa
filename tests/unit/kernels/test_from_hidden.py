"""Losses from hidden states, chunk by chunk: values, gradients, and where the head's gradient goes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from sdpo_megatron.kernels.from_hidden import HiddenPart, logprobs_from_hidden, loss_from_hidden
from sdpo_megatron.kernels.objective import FullVocabulary, Objective, TokenLevel, TopK
from sdpo_megatron.kernels.rows import LogitRows, RowNumbers
from sdpo_megatron.kernels.vocab import VocabShard
from tests.unit.kernels import oracles

ROWS, HIDDEN, VOCABULARY, COLUMNS, TEACHER_ROWS = 13, 8, 101, 104, 9
OBJECTIVES: list[Objective] = [
    TokenLevel(),
    FullVocabulary(0.0),
    FullVocabulary(0.5),
    FullVocabulary(1.0),
    TopK(0.0, 20, "tail", "student"),
    TopK(0.5, 50, "renormalise", "teacher"),
]


@dataclass(frozen=True)
class Problem:
    """What `loss_from_hidden` gets. Some of the teacher's rows serve two of the student's, one none."""

    hidden_UD: Tensor
    head_VD: Tensor
    teacher: Sequence[HiddenPart]
    target_U: Tensor
    weight_U: Tensor
    slope_U: Tensor

    def loss_of(self, rows: slice, logprob_U: Tensor, divergence_U: Tensor, numbers: RowNumbers) -> Tensor:
        return (self.weight_U[rows] * divergence_U + self.slope_U[rows] * logprob_U).sum()

    def run(
        self, objective: Objective, chunk_tokens: int, scale: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, gradient by hidden states, gradient by the head)"""
        hidden_UD, head_VD = self.hidden_UD.clone().requires_grad_(), self.head_VD.clone().requires_grad_()
        loss = loss_from_hidden(
            *(hidden_UD, head_VD, self.teacher, self.target_U, self.loss_of),
            objective=objective,
            shard=SHARD,
            chunk_tokens=chunk_tokens,
        )
        (scale * loss).backward()
        assert hidden_UD.grad is not None and head_VD.grad is not None
        return loss.detach(), hidden_UD.grad, head_VD.grad


SHARD = VocabShard(start=0, vocab_size=VOCABULARY, temperature=1.2)


def problem(parts: int = 1) -> Problem:
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    head_VD = random(COLUMNS, HIDDEN)
    shares = [1.0] if parts == 1 else [0.99, 0.01]
    teacher = [
        HiddenPart(
            share,
            random(TEACHER_ROWS, HIDDEN),
            head_VD + 0.3 * random(COLUMNS, HIDDEN),
            torch.randint(TEACHER_ROWS, (ROWS,), generator=generator),
        )
        for share in shares
    ]
    weight_U, slope_U = torch.rand(2, ROWS, generator=generator) - 0.3
    target_U = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    return Problem(random(ROWS, HIDDEN), head_VD, teacher, target_U, weight_U, slope_U)


def expected(of: Problem, objective: Objective) -> tuple[float, np.ndarray, np.ndarray]:
    hidden_UD, head_VD = of.hidden_UD.double().numpy(), of.head_VD[:VOCABULARY].double().numpy()
    student_UV = hidden_UD @ head_VD.T
    teacher_UV = np.zeros_like(student_UV)
    for part in of.teacher:
        rows_UD = part.hidden_RD.double().numpy()[part.row_U.numpy()]
        teacher_UV += part.share * (rows_UD @ part.head_VD[:VOCABULARY].double().numpy().T)
    logprob = oracles.logprob(student_UV, of.target_U.numpy(), SHARD.temperature)
    slope_U, weight_U = of.slope_U.double().numpy(), of.weight_U.double().numpy()
    loss, gradient_UV = (slope_U * logprob.value_T).sum(), slope_U[:, None] * logprob.gradient_TV
    if isinstance(objective, FullVocabulary | TopK):
        divergence = oracles.of_objective(student_UV, teacher_UV, objective, SHARD.temperature)
        loss += (weight_U * divergence.value_T).sum()
        gradient_UV = gradient_UV + weight_U[:, None] * divergence.gradient_TV
    head_gradient_VD = np.zeros((COLUMNS, HIDDEN))
    head_gradient_VD[:VOCABULARY] = gradient_UV.T @ hidden_UD
    return loss, gradient_UV @ head_VD, head_gradient_VD


def close(actual: Tensor, expected: np.ndarray, bound: float = 5e-6) -> None:
    error = np.abs(actual.double().numpy() - expected).max()
    assert error <= bound * np.abs(expected).max()


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_equals_float64(objective, parts):
    of = problem(parts)
    loss, hidden_grad_UD, head_grad_VD = of.run(objective, chunk_tokens=5, scale=-3.0)
    expected_loss, *gradients = expected(of, objective)
    assert loss.item() == pytest.approx(expected_loss, rel=3e-6)
    close(hidden_grad_UD, -3.0 * gradients[0])
    close(head_grad_VD, -3.0 * gradients[1])
    assert not head_grad_VD[VOCABULARY:].any()


def test_through_tritons_kernels(device):
    of = problem()
    part = of.teacher[0]
    moved = Problem(
        of.hidden_UD.to(device),
        of.head_VD.to(device),
        [HiddenPart(1.0, part.hidden_RD.to(device), part.head_VD.to(device), part.row_U.to(device))],
        of.target_U.to(device),
        of.weight_U.to(device),
        of.slope_U.to(device),
    )
    loss, hidden_grad_UD, head_grad_VD = moved.run(FullVocabulary(0.5), chunk_tokens=5)
    expected_loss, *gradients = expected(of, FullVocabulary(0.5))
    assert loss.item() == pytest.approx(expected_loss, rel=3e-6)
    close(hidden_grad_UD.cpu(), gradients[0])
    close(head_grad_VD.cpu(), gradients[1])


@pytest.mark.parametrize("chunk_tokens", [1, 7])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_the_size_of_chunks_changes_nothing(objective, chunk_tokens):
    of = problem(parts=2)
    for ours, whole in zip(of.run(objective, chunk_tokens), of.run(objective, ROWS), strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_log_probabilities_are_those_that_the_loss_sees(objective):
    of = problem(parts=2)
    inputs = (of.hidden_UD, of.head_VD, of.teacher, of.target_U)
    student_U, teacher_U = logprobs_from_hidden(*inputs, shard=SHARD, chunk_tokens=5)
    seen: list[slice] = []

    def loss_of(rows: slice, logprob_U: Tensor, divergence_U: Tensor, numbers: RowNumbers) -> Tensor:
        seen.append(rows)
        assert numbers.teacher is not None
        torch.testing.assert_close(numbers.student.logprob_U, student_U[rows], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(numbers.teacher.logprob_U, teacher_U[rows], rtol=1e-6, atol=1e-6)
        return logprob_U.sum()

    loss_from_hidden(*inputs, loss_of, objective=objective, shard=SHARD, chunk_tokens=5)
    assert [rows.start for rows in seen] == [0, 5, 10] and seen[-1].stop == ROWS
    alone_U, none_U = logprobs_from_hidden(
        of.hidden_UD, of.head_VD, [], of.target_U, shard=SHARD, chunk_tokens=5
    )
    assert alone_U.equal(student_U) and not none_U.any()


def test_without_a_teacher():
    of = replace(problem(), teacher=[])
    loss, hidden_grad_UD, head_grad_VD = of.run(TokenLevel(), chunk_tokens=5)
    expected_loss, *gradients = expected(of, TokenLevel())
    assert loss.item() == pytest.approx(expected_loss, rel=3e-6)
    close(hidden_grad_UD, gradients[0])
    close(head_grad_VD, gradients[1])


def test_shapes_that_do_not_fit_are_named():
    of = problem()
    part = of.teacher[0]
    for changes, message in (
        ({"target_U": of.target_U[:5]}, "U is 5 in target_U but 13 in hidden_UD"),
        ({"head_VD": of.head_VD[:, :7]}, "D is 7 in head_VD but 8 in hidden_UD"),
        ({"teacher": [replace(part, row_U=part.row_U[:5])]}, "U is 5 in row_U but 13 in target_U"),
        ({"teacher": [replace(part, head_VD=part.head_VD[:, :7])]}, "D is 7 in head_VD but 8 in hidden_RD"),
        (
            {"teacher": [replace(part, head_VD=part.head_VD[:7])]},
            "V is 7 in teacher_UV but 104 in student_UV",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            replace(of, **changes).run(TokenLevel(), chunk_tokens=5)
    with pytest.raises(ValueError, match="U is 5 in target_U"):
        logprobs_from_hidden(
            of.hidden_UD, of.head_VD, of.teacher, of.target_U[:5], shard=SHARD, chunk_tokens=5
        )


def test_a_loss_of_the_gap_to_the_teacher():
    """Token-level SDPO as the loss sees it: the teacher's log-probabilities belong to the same rows."""
    of = problem(parts=2)

    def loss_of(rows: slice, logprob_U: Tensor, divergence_U: Tensor, numbers: RowNumbers) -> Tensor:
        assert numbers.teacher is not None
        return -((numbers.teacher.logprob_U - logprob_U).detach() * logprob_U).sum()

    hidden_UD = of.hidden_UD.clone().requires_grad_()
    loss_from_hidden(
        *(hidden_UD, of.head_VD, of.teacher, of.target_U, loss_of),
        objective=TokenLevel(),
        shard=SHARD,
        chunk_tokens=4,
    ).backward()
    head_VD = of.head_VD[:VOCABULARY].double()
    exact_UD = of.hidden_UD.double().requires_grad_()
    teacher_UV = torch.zeros(ROWS, VOCABULARY, dtype=torch.float64)
    for part in of.teacher:
        teacher_UV += part.share * (
            part.hidden_RD.double()[part.row_U] @ part.head_VD[:VOCABULARY].double().T
        )
    student_U, teacher_U = (
        (logits_UV / SHARD.temperature).log_softmax(-1).gather(1, of.target_U[:, None])[:, 0]
        for logits_UV in (exact_UD @ head_VD.T, teacher_UV)
    )
    (-((teacher_U - student_U).detach() * student_U).sum()).backward()
    assert hidden_UD.grad is not None and exact_UD.grad is not None
    close(hidden_UD.grad, exact_UD.grad.numpy())


# ------------------------------------------------------- the head's gradient


def learn_head(head_VD: torch.nn.Parameter, of: Problem, scale: float) -> None:
    loss = loss_from_hidden(
        *(of.hidden_UD.to(head_VD.dtype), head_VD, of.teacher, of.target_U, of.loss_of),
        objective=FullVocabulary(1.0),
        shard=SHARD,
        chunk_tokens=1,
    )
    (scale * loss).backward()


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_main_grad_gets_the_heads_gradient_and_autograd_zeros(scale):
    of = problem()
    _, _, expected_VD = of.run(FullVocabulary(1.0), 1)
    head_VD = torch.nn.Parameter(of.head_VD.clone())
    head_VD.main_grad = torch.ones(COLUMNS, HIDDEN)  # type: ignore[attr-defined]
    head_VD.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    for times in (1, 2):
        learn_head(head_VD, of, scale)
        torch.testing.assert_close(
            head_VD.main_grad,  # type: ignore[attr-defined]
            1.0 + times * scale * expected_VD,
            rtol=1e-5,
            atol=2e-6,
        )
    assert head_VD.grad_added_to_main_grad is True  # type: ignore[attr-defined]
    assert head_VD.grad is not None and not head_VD.grad.any()


def test_without_main_grad_autograd_gets_it():
    of = problem()
    _, _, expected_VD = of.run(FullVocabulary(1.0), 1)
    head_VD = torch.nn.Parameter(of.head_VD.clone())
    learn_head(head_VD, of, 0.25)
    assert head_VD.grad is not None
    torch.testing.assert_close(head_VD.grad, 0.25 * expected_VD, rtol=1e-5, atol=2e-6)


def test_a_bfloat16_heads_gradient_is_summed_in_float32():
    """Many chunks of one row each: every addition in bfloat16 would lose what is below 2**-9 of the sum."""
    of, repeats = problem(), 40
    repeated = Problem(
        of.hidden_UD.repeat(repeats, 1).bfloat16(),
        of.head_VD.bfloat16(),
        [replace(of.teacher[0], row_U=of.teacher[0].row_U.repeat(repeats))],
        *(x.repeat(repeats) for x in (of.target_U, of.weight_U, of.slope_U)),
    )
    head_VD = torch.nn.Parameter(repeated.head_VD.clone())
    head_VD.main_grad = torch.zeros(COLUMNS, HIDDEN)  # type: ignore[attr-defined]
    head_VD.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    learn_head(head_VD, repeated, 1.0)

    products, naive_VD = rows_products(repeated), torch.zeros(COLUMNS, HIDDEN, dtype=torch.bfloat16)
    for gradient_V, hidden_D in products:
        naive_VD += torch.outer(gradient_V, hidden_D)
    exact_VD = sum(torch.outer(gradient_V.double(), hidden_D.double()) for gradient_V, hidden_D in products)
    assert isinstance(exact_VD, Tensor)

    def error(head_grad_VD: Tensor) -> float:
        return ((head_grad_VD.double() - exact_VD).abs().max() / exact_VD.abs().max()).item()

    ours = error(head_VD.main_grad)  # type: ignore[attr-defined]
    additions = ROWS * repeats
    assert ours < additions * 2**-24, "each addition errs by half of float32's last digit at most"
    assert error(naive_VD) > 1000 * ours


def rows_products(of: Problem) -> list[tuple[Tensor, Tensor]]:
    """The gradient by the logits of each row, rounded to bfloat16 as the chunks have it, and its hidden state."""
    products = []
    for row in range(len(of.hidden_UD)):
        student_UV = of.hidden_UD[row : row + 1] @ of.head_VD.T
        teacher_UV = of.teacher[0].logits(slice(row, row + 1))
        objective = FullVocabulary(1.0)
        target_U, one = of.target_U[row : row + 1], slice(row, row + 1)
        logits = LogitRows(student_UV, teacher_UV, target_U, SHARD)
        objective.write_gradient_(logits, objective.evaluate(logits), of.weight_U[one], of.slope_U[one])
        products.append((student_UV[0], of.hidden_UD[row]))
    return products
