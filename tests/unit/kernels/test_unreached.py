"""The share of the teacher's probability that the student does not reach: against float64, on every case and shard, and
beside every objective, whose numbers and gradients stay as they are."""

from typing import Any

import numpy as np
import pytest
import torch

from sdpo_megatron.kernels.objective import (
    ClippedTopK,
    Examined,
    FullVocabulary,
    Objective,
    TokenLevel,
    TopK,
)
from sdpo_megatron.kernels.rows import LogitRows, RowNumbers
from sdpo_megatron.kernels.unreached import unreached_definition
from tests.unit.kernels.cases import CASES, Case, on_every_shard, ordinary
from tests.unit.kernels.oracles import Array

OBJECTIVES: list[Objective] = [
    TokenLevel(),
    FullVocabulary(0.0),
    FullVocabulary(0.5),
    FullVocabulary(1.0),
    TopK(1.0, 20, "tail", "student"),
    ClippedTopK(20, 0.2, 0.28),
]
FLOORS = [1e-4, 2e-3]
"""As it is used, and one that lies in the middle of these distributions."""


def softmax(logits_TV: Array, temperature: float) -> Array:
    scaled_TV = logits_TV / temperature
    exp_TV = np.exp(scaled_TV - scaled_TV.max(-1, keepdims=True))
    return exp_TV / exp_TV.sum(-1, keepdims=True)


def expected(case: Case, floor: float) -> tuple[Array, Array]:
    """The share of each row in float64, and how much of it may be on either side by float32's rounding."""
    student_TV = softmax(case.exact(case.student_TV), case.temperature)
    teacher_TV = softmax(case.exact(case.teacher_TV), case.temperature)
    at_the_edge_TV = np.abs(np.log(np.maximum(student_TV, 1e-300) / floor)) < 1e-3
    return (teacher_TV * (student_TV < floor)).sum(-1), (teacher_TV * at_the_edge_TV).sum(-1)


def found(case: Case, objective: Objective, floor: float) -> tuple[torch.Tensor, Any, torch.Tensor]:
    """(the shares, the objective's own numbers, the gradient) of all shards side by side."""

    def on_shard(columns: slice, shard) -> tuple[RowNumbers, torch.Tensor]:
        student_TV, teacher_TV = case.student_TV[:, columns].clone(), case.teacher_TV[:, columns].clone()
        logits = LogitRows(student_TV, teacher_TV, case.target_T, shard)
        examined = Examined(objective, floor)
        rows = examined.evaluate(logits)
        examined.write_gradient_(logits, rows, case.weight_T, case.slope_T)
        return rows, student_TV

    shards = on_every_shard(case, on_shard)
    rows, share_T = shards[0][0], shards[0][0].unreached_U
    assert share_T is not None
    assert all(other.unreached_U is not None and other.unreached_U.equal(share_T) for other, _ in shards)
    return share_T, rows, torch.cat([gradient_TV for _, gradient_TV in shards], 1)


@pytest.mark.parametrize("floor", FLOORS)
@pytest.mark.parametrize("name", CASES)
def test_every_case_is_float64s(name: str, floor: float):
    case = CASES[name]()
    share_T, edge_T = expected(case, floor)
    got_T = found(case, FullVocabulary(1.0), floor)[0].cpu().double().numpy()
    assert np.all(np.abs(got_T - share_T) <= 2e-5 + edge_T), (got_T, share_T, edge_T)


def test_the_cases_have_something_to_find():
    shares = np.concatenate([expected(CASES[name](), floor)[0] for name in CASES for floor in FLOORS])
    assert shares.min() < 0.01 and shares.max() > 0.99 and np.sum((shares > 0.1) & (shares < 0.9)) > 20


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_beside_every_objective_which_stays_what_it_is(objective: Objective, shards: int, device: str):
    case = Case(**{**vars(ordinary(vocab_size=532)), "shards": shards}).to(device)
    share_T, edge_T = expected(case, 2e-3)
    got_T, rows, gradient_TV = found(case, objective, 2e-3)
    assert np.all(np.abs(got_T.cpu().double().numpy() - share_T) <= 2e-5 + edge_T)

    def plain(columns: slice, shard) -> tuple[Any, torch.Tensor]:
        student_TV, teacher_TV = case.student_TV[:, columns].clone(), case.teacher_TV[:, columns].clone()
        logits = LogitRows(student_TV, teacher_TV, case.target_T, shard)
        numbers = objective.evaluate(logits)
        objective.write_gradient_(logits, numbers, case.weight_T, case.slope_T)
        return numbers, student_TV

    alone = on_every_shard(case, plain)
    assert torch.cat([gradient for _, gradient in alone], 1).equal(gradient_TV)
    numbers = alone[0][0]
    for ours, theirs in (
        (rows.student.logprob_U, numbers.student.logprob_U),
        (rows.teacher.logprob_U, numbers.teacher.logprob_U),
        (rows.divergence_U, numbers.divergence_U),
        (rows.mass_U, numbers.mass_U),
    ):
        assert ours is theirs is None or ours.equal(theirs)


def test_the_definition_is_float64s():
    case = ordinary()
    definition_T = unreached_definition(
        case.student_TV.double(), case.teacher_TV.double(), floor=2e-3, temperature=1.0
    )
    np.testing.assert_allclose(definition_T.numpy(), expected(case, 2e-3)[0], rtol=1e-12)


def test_more_rows_than_are_in_work_at_a_time():
    case = ordinary(rows=150, vocab_size=97)
    got_T = found(case, TokenLevel(), 2e-3)[0]
    definition_T = unreached_definition(case.student_TV, case.teacher_TV, floor=2e-3, temperature=1.0)
    torch.testing.assert_close(got_T, definition_T, rtol=1e-5, atol=1e-6)
