"""Log-probabilities over sharded logits and their gradient, plain and Triton, against float64."""

import pytest

from sdpo_megatron.kernels.objective import TokenLevel
from sdpo_megatron.kernels.rows import LogitRows
from sdpo_megatron.kernels.vocab import VocabShard
from tests.unit.kernels.cases import CASES, NAN, holds, ordinary, run, student_without_some


def test_values_and_gradient(device: str, subtests: pytest.Subtests):
    for name, case in (CASES | {"minus infinity anywhere": student_without_some}).items():
        with subtests.test(name):
            holds(case().to(device), TokenLevel())


def test_rows_without_a_coefficient_are_not_read_for_the_gradient(device: str):
    """Such a row has a NaN among its logits, and none in its gradient."""
    case = ordinary().to(device)
    case.student_TV[4, 7] = NAN
    assert case.slope_T[4] == 0
    gradient_TV = run(case, TokenLevel()).gradient_TV
    assert not gradient_TV[4].any() and gradient_TV.isfinite().all() and gradient_TV[3].any()


def test_nan_is_not_hidden(device: str):
    """A model that has broken down must end the run: its logits do not count as minus infinity."""
    for column in (0, 290):
        case = ordinary(rows=3, vocab_size=300).to(device)
        case.student_TV[1, column] = NAN
        shard = VocabShard(start=0, vocab_size=300)
        student = TokenLevel().evaluate(LogitRows(case.student_TV, None, case.target_T, shard)).student
        flags = [False, True, False]
        assert student.logprob_U.isnan().tolist() == student.entropy_U.isnan().tolist() == flags, column


def test_logits_that_do_not_fit_are_named():
    case, shard = ordinary(), VocabShard(start=0, vocab_size=530)
    with pytest.raises(ValueError, match="U is 5 in target_U but 6 in student_UV"):
        LogitRows(case.student_TV, None, case.target_T[:5], shard)
    with pytest.raises(ValueError, match="V is 529 in teacher_UV but 530 in student_UV"):
        LogitRows(case.student_TV, case.teacher_TV[:, :529], case.target_T, shard)
