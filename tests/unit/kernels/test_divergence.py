"""Divergences over the whole vocabulary, plain and Triton, against float64."""

import pytest
import torch

from sdpo_megatron.kernels.objective import FullVocabulary
from sdpo_megatron.kernels.rows import LogitRows
from sdpo_megatron.kernels.vocab import VocabShard
from tests.unit.kernels.cases import CASES, NAN, holds, ordinary, run, student_without_some

ALPHAS = (0.0, 0.3, 1.0)
IN_TRITON: dict[str, tuple[float, ...]] = {
    "ordinary": (0.0, 0.3, 0.5, 1.0),
    "one row": (0.0, 1.0),
    "fewer columns than a block": (0.3, 1.0),
    "a multiple of the block": (0.3, 1.0),
    "temperature 0.7": ALPHAS,
    "temperature 1.3, sharded": (0.0,),
    "minus infinity in padding": (0.3,),
    "minus infinity in a whole shard": (0.0, 1.0),
    "minus infinity in the first shard": (0.3,),
    "far from zero": ALPHAS,
    "spread by thousands": ALPHAS,
    "offset": ALPHAS,
    "peaked": ALPHAS,
    "garbage one column behind two blocks": ALPHAS,
    "garbage in the last shard": (0.3,),
    "a shard beyond the vocabulary": (1.0,),
    "bfloat16": (0.3,),
    "bfloat16, peaked": (0.0, 1.0),
}
"""The interpreter is slow: each edge case meets the kernels that it could break, where plain torch meets all."""


def test_values_and_gradient(device: str, kernels: str, subtests: pytest.Subtests):
    alphas = IN_TRITON if kernels == "triton" else dict.fromkeys(CASES, (*ALPHAS, 0.5))
    for name, some in alphas.items():
        for alpha in some:
            with subtests.test(name, alpha=alpha):
                holds(CASES[name]().to(device), FullVocabulary(alpha))


def test_tokens_that_the_student_alone_rules_out(device: str, subtests: pytest.Subtests):
    """Forward KL is infinite there."""
    for alpha in (0.5, 1.0):
        with subtests.test(alpha=alpha):
            holds(student_without_some().to(device), FullVocabulary(alpha))


def test_rows_without_a_coefficient_are_not_read_for_the_gradient(device: str, subtests: pytest.Subtests):
    """Such a row has a NaN among its logits, and none in its gradient."""
    for alpha in ALPHAS:
        with subtests.test(alpha=alpha):
            case = ordinary(vocab_size=41).to(device)
            case.student_TV[4, 7] = NAN
            assert case.slope_T[4] == case.weight_T[4] == 0
            gradient_TV = run(case, FullVocabulary(alpha)).gradient_TV
            assert not gradient_TV[4].any() and gradient_TV.isfinite().all()
            # each of these has one coefficient only
            assert gradient_TV[1].any() and gradient_TV[2].any()


def test_nan_is_not_hidden(device: str, subtests: pytest.Subtests):
    """A model that has broken down must end the run: its logits do not count as minus infinity."""
    for alpha in ALPHAS:
        for model in ("student_TV", "teacher_TV"):
            with subtests.test(model, alpha=alpha):
                case = ordinary(rows=3, vocab_size=300)
                getattr(case, model)[1, 290] = NAN
                case = case.to(device)
                rows = FullVocabulary(alpha).evaluate(
                    LogitRows(
                        case.student_TV,
                        case.teacher_TV,
                        case.target_T,
                        VocabShard(start=0, vocab_size=300),
                    )
                )
                assert rows.divergence_U.isnan().tolist() == [False, True, False]
                softmax = rows.student if model == "student_TV" else rows.teacher
                assert softmax.logprob_U.isnan().tolist() == [False, True, False]


def test_a_divergence_needs_a_teacher():
    logits = LogitRows(
        torch.zeros(2, 3), None, torch.zeros(2, dtype=torch.int64), VocabShard(start=0, vocab_size=3)
    )
    with pytest.raises(ValueError, match="teacher_UV is None"):
        FullVocabulary(1.0).evaluate(logits)
