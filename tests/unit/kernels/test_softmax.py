"""The policy gradient over sharded logits, plain and Triton, against float64."""

import pytest
import torch

from sdpo_megatron.kernels.softmax import policy_gradient, row_softmax
from sdpo_megatron.kernels.vocab import VocabShard
from tests.unit.kernels.cases import (
    CASES,
    MASKED,
    NAN,
    check,
    ordinary,
    run_policy_gradient,
    student_without_some,
)

ALL_CASES = CASES | MASKED | {"minus infinity anywhere": student_without_some}


@pytest.mark.parametrize("name", ALL_CASES)
def test_values_and_gradient(name, device):
    case = ALL_CASES[name]().to(device)
    check(case, run_policy_gradient(case))


def test_gradient_of_a_clipped_ratio_times_what_comes_from_above(device):
    """The [T]-sized part is anything differentiable, and the loss may be part of a larger one."""
    case = ordinary().to(device)
    advantage_T, old_T = case.slope_T, torch.full_like(case.slope_T, -7.0)

    def loss_of(logprob_T):
        ratio_T = (logprob_T - old_T).exp()
        clipped_T = ratio_T.clamp(0.8, 1.2)
        return -torch.minimum(ratio_T * advantage_T, clipped_T * advantage_T).sum(), ratio_T.detach()

    logits_TV = case.student_TV.clone().requires_grad_()
    shard = VocabShard(start=0, vocab_size=case.vocab_size)
    loss, ratio_T, _ = policy_gradient(logits_TV, case.target_T, loss_of, shard=shard)
    (-3.0 * loss).backward()

    exact_TV = case.student_TV.double().requires_grad_()
    expected, expected_ratio_T = loss_of(
        exact_TV.log_softmax(-1).gather(1, case.target_T[:, None])[:, 0].to(torch.float64)
    )
    (-3.0 * expected).backward()
    assert logits_TV.grad is not None and exact_TV.grad is not None
    torch.testing.assert_close(loss.detach().double(), expected.detach(), rtol=5e-6, atol=0)
    torch.testing.assert_close(ratio_T.double(), expected_ratio_T, rtol=5e-6, atol=0)
    bound = 5e-6 * exact_TV.grad.abs().max().item()
    torch.testing.assert_close(logits_TV.grad.double(), exact_TV.grad, rtol=0, atol=bound)


def test_without_a_gradient_the_logits_stay(device):
    case = ordinary().to(device)
    before_TV = case.student_TV.clone()
    shard = VocabShard(start=0, vocab_size=case.vocab_size)
    policy_gradient(case.student_TV, case.target_T, lambda x_T: (x_T.sum(), None), shard=shard)
    assert case.student_TV.equal(before_TV)


@pytest.mark.parametrize("column", [0, 290])
def test_nan_is_not_hidden(column, device):
    case = ordinary(rows=3, vocab_size=300).to(device)
    case.student_TV[1, column] = NAN
    rows = row_softmax(case.student_TV, case.target_T, VocabShard(start=0, vocab_size=300))
    assert rows.logprob_U.isnan().tolist() == rows.entropy_U.isnan().tolist() == [False, True, False]
