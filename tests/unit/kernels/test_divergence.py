"""Divergences over the whole vocabulary, plain and Triton, against float64."""

import pytest

from sdpo_megatron.kernels.objective import FullVocabulary
from sdpo_megatron.kernels.vocab import VocabShard
from tests.unit.kernels import oracles
from tests.unit.kernels.cases import (
    CASES,
    MASKED,
    NAN,
    Case,
    check,
    ordinary,
    run_divergence,
    student_without_some,
)

ALL_CASES = CASES | MASKED
HALF = ["ordinary", "peaked", "targets in other shards"]
PAIRS = [(name, alpha) for alpha in (0.0, 0.3, 1.0) for name in ALL_CASES] + [(name, 0.5) for name in HALF]


def expected(case: Case, alpha: float) -> oracles.Expected:
    return oracles.divergence(
        case.exact(case.student_TV), case.exact(case.teacher_TV), alpha, case.temperature
    )


@pytest.mark.parametrize(("name", "alpha"), PAIRS)
def test_values_and_gradient(name, alpha, device):
    case = ALL_CASES[name]().to(device)
    check(case, run_divergence(case, alpha), expected(case, alpha))


@pytest.mark.parametrize("alpha", [0.3, 0.5, 1.0])
def test_tokens_that_the_student_alone_rules_out(alpha, device):
    """Forward KL is infinite there."""
    case = student_without_some().to(device)
    check(case, run_divergence(case, alpha), expected(case, alpha))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("model", ["student_TV", "teacher_TV"])
def test_nan_is_not_hidden(model, alpha, device):
    """A model that has broken down must end the run: its logits do not count as minus infinity."""
    case = ordinary(rows=3, vocab_size=300)
    getattr(case, model)[1, 290] = NAN
    rows = FullVocabulary(alpha).rows(
        *(case.student_TV.to(device), case.teacher_TV.to(device), case.target_T.to(device)),
        VocabShard(start=0, vocab_size=300),
    )
    assert rows.divergence_U.isnan().tolist() == [False, True, False]
    softmax = rows.student if model == "student_TV" else rows.teacher
    assert softmax.logprob_U.isnan().tolist() == [False, True, False]
