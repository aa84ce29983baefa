"""What the kernels must not touch: nothing around the logits and around their own results is read or written."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sdpo_megatron.kernels.objective import FullVocabulary, Objective, TokenLevel, TopK
from sdpo_megatron.kernels.rows import LogitRows
from sdpo_megatron.kernels.vocab import VocabShard
from tests.unit.kernels.cases import Case, in_bfloat16, ordinary, padded, same_bits

OBJECTIVES: list[Objective] = [
    TokenLevel(),
    FullVocabulary(0.0),
    FullVocabulary(0.3),
    FullVocabulary(1.0),
    TopK(0.5, 20, "tail", "student"),
]
MARGIN = 37
ROWS_BELOW = 8
"""More than a block's columns."""


class Surrounded:
    """A tensor inside a larger one that is NaN everywhere else: to read beyond it spoils results."""

    def __init__(self, x_TV: Tensor) -> None:
        rows, columns = x_TV.shape
        self.buffer = x_TV.new_full((1 + rows + ROWS_BELOW, columns + 2 * MARGIN), float("nan"))
        self.inside_TV = self.buffer[1 : 1 + rows, MARGIN : MARGIN + columns]
        self.inside_TV.copy_(x_TV)

    def untouched(self) -> bool:
        outside = self.buffer.clone()
        outside[1:-ROWS_BELOW, MARGIN:-MARGIN] = float("nan")
        return bool(outside.isnan().all())


def run(objective: Objective, case: Case, student_TV: Tensor, teacher_TV: Tensor) -> tuple[Tensor, ...]:
    shard = VocabShard(start=0, vocab_size=case.vocab_size, temperature=case.temperature)
    before = student_TV.clone(), teacher_TV.clone()
    logits = LogitRows(student_TV, teacher_TV, case.target_T, shard)
    rows = objective.evaluate(logits)
    assert same_bits(student_TV, before[0]) and same_bits(teacher_TV, before[1])
    objective.write_gradient_(logits, rows, case.weight_T, case.slope_T)
    assert rows.teacher is not None
    divergence_T = case.weight_T if rows.divergence_U is None else rows.divergence_U
    return rows.student.logprob_U, rows.teacher.logprob_U, divergence_T, student_TV


def test_nothing_around_the_logits_is_touched(device: str, subtests: pytest.Subtests):
    cases = {"float32": ordinary(rows=4, vocab_size=41), "bfloat16": in_bfloat16(padded(300, 1, 305), 1.0)}
    for name, case in cases.items():
        for objective in OBJECTIVES:
            with subtests.test(name, objective=objective):
                leaves_surroundings_alone(case.to(device), objective)


def leaves_surroundings_alone(case: Case, objective: Objective) -> None:
    student, teacher = Surrounded(case.student_TV), Surrounded(case.teacher_TV)
    got = run(objective, case, student.inside_TV, teacher.inside_TV)
    assert student.untouched() and teacher.untouched()
    assert same_bits(teacher.inside_TV, case.teacher_TV)
    expected = run(objective, case, case.student_TV.clone(), case.teacher_TV.clone())
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.isfinite().all() and ours.equal(theirs)


@pytest.fixture
def surrounded_results(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """The buffers around whatever the launchers allocate for results."""
    buffers: list[Tensor] = []
    plain = torch.empty

    def empty(*size: int, **options) -> Tensor:
        count = torch.Size(size).numel()
        buffers.append(plain(count + 2 * MARGIN, **options).fill_(7.0))
        return buffers[-1][MARGIN : MARGIN + count].view(size)

    monkeypatch.setattr(torch, "empty", empty)
    yield buffers


@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
def test_nothing_around_the_results_is_touched(device, surrounded_results, subtests: pytest.Subtests):
    for objective in OBJECTIVES:
        with subtests.test(objective=objective):
            surrounded_results.clear()
            case = ordinary(rows=4, vocab_size=300).to(device)
            student, teacher = Surrounded(case.student_TV), Surrounded(case.teacher_TV)
            got = run(objective, case, student.inside_TV, teacher.inside_TV)
            assert all(x.isfinite().all() for x in got)
            assert surrounded_results
            for buffer in surrounded_results:
                assert (buffer[:MARGIN] == 7.0).all() and (buffer[-MARGIN:] == 7.0).all()


def test_rows_further_than_32_bits_can_count(device: str, subtests: pytest.Subtests):
    """The third row is 2**31 elements behind the first, in memory that is never touched between them."""
    case = in_bfloat16(ordinary(rows=3, vocab_size=300), 1.0).to(device)
    stride = 2**30 + 64
    for objective in OBJECTIVES[:4]:
        with subtests.test(objective=objective):
            far = []
            for x_TV in (case.student_TV, case.teacher_TV):
                buffer = torch.empty(2 * stride + 300, dtype=torch.bfloat16, device=device)
                far.append(buffer.as_strided((3, 300), (stride, 1)))
                far[-1].copy_(x_TV)
            expected = run(objective, case, case.student_TV.clone(), case.teacher_TV.clone())
            for ours, theirs in zip(run(objective, case, *far), expected, strict=True):
                # a GPU's compiler makes other code of rows that are not aligned alike
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
