"""The clipped surrogate on K tokens: against its formula, float64 and, where nothing has moved, reverse KL."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from sdpo_megatron.kernels.clipped_top_k import clipped_top_k_definition
from sdpo_megatron.kernels.objective import ClippedTopK, TopK
from sdpo_megatron.kernels.rows import LogitRows
from sdpo_megatron.kernels.vocab import VocabShard
from tests.unit.kernels.cases import CASES, Case, on_every_shard, ordinary, run
from tests.unit.kernels.oracles import Array, log_softmax

OBJECTIVE = ClippedTopK(20, 0.2, 0.28)


def old_logits(case: Case) -> Tensor:
    """Of a policy near the student: about half of its ratios are outside of the clip."""
    generator = torch.Generator().manual_seed(3)
    return case.student_TV + 0.5 * torch.randn(case.student_TV.shape, generator=generator)


def surrogate(
    student_TV: Array, base_TV: Array, teacher_TV: Array, old_TV: Array, temperature: float
) -> Array:
    """Equation 13 in NumPy, outcome by outcome; the advantages are the student's at `base_TV`."""
    logs = [log_softmax(x_TV, temperature) for x_TV in (student_TV, base_TV, teacher_TV, old_TV)]
    values = np.zeros(len(student_TV))
    for row, support_K in enumerate(np.argsort(-logs[3], axis=-1)[:, : OBJECTIVE.k]):
        rest = np.setdiff1d(np.arange(student_TV.shape[1]), support_K)
        student, base, teacher, old = (
            [*x_TV[row, support_K], np.logaddexp.reduce(x_TV[row, rest])] for x_TV in logs
        )
        for p, p0, q, o in zip(student, base, teacher, old, strict=True):
            ratio, advantage = np.exp(p - o), q - p0
            clipped = min(max(ratio, 1 - OBJECTIVE.clip_low), 1 + OBJECTIVE.clip_high)
            values[row] -= np.exp(o) * min(ratio * advantage, clipped * advantage)
    return values


def test_the_definition_is_the_formula_and_its_gradient_holds_advantages_constant():
    case = ordinary(rows=3, vocab_size=43)
    student_TV, teacher_TV, old_TV = (
        x_TV.double() for x_TV in (case.student_TV, case.teacher_TV, old_logits(case))
    )
    leaf_TV = student_TV.clone().requires_grad_()
    values_T = clipped_top_k_definition(leaf_TV, teacher_TV, old_TV, **vars(OBJECTIVE), temperature=0.7)
    (gradient_TV,) = torch.autograd.grad(values_T.sum(), leaf_TV)
    base, teacher, old = student_TV.numpy(), teacher_TV.numpy(), old_TV.numpy()
    np.testing.assert_allclose(
        values_T.detach().numpy(), surrogate(base, base, teacher, old, 0.7), rtol=1e-12
    )
    for column in range(43):
        shift = 1e-6 * np.eye(43)[column]
        higher, lower = (surrogate(base + s, base, teacher, old, 0.7) for s in (shift, -shift))
        np.testing.assert_allclose(gradient_TV[:, column].numpy(), (higher - lower) / 2e-6, atol=2e-7)


@pytest.mark.parametrize(
    "name", ["ordinary", "temperature 1.3, sharded", "targets in other shards", "peaked"]
)
def test_rows_and_gradient_are_the_definitions(name: str, device: str):
    case = CASES[name]()
    old_TV = old_logits(case)

    def on_shard(columns: slice, shard: VocabShard) -> tuple[Tensor, Tensor, Tensor]:
        own = [x_TV[:, columns].clone() for x_TV in (case.student_TV, case.teacher_TV, old_TV)]
        logits = LogitRows(own[0], own[1], case.target_T, shard, own[2])
        rows = OBJECTIVE.evaluate(logits)
        assert own[0].equal(case.student_TV[:, columns]) and own[2].equal(old_TV[:, columns])
        OBJECTIVE.write_gradient_(logits, rows, case.weight_T, case.slope_T)
        return rows.divergence_U, rows.student.logprob_U, own[0]

    shards = on_every_shard(case, on_shard)
    leaf_TV = case.student_TV.double().requires_grad_()
    values_T = clipped_top_k_definition(
        *(leaf_TV, case.teacher_TV.double(), old_TV.double()), **vars(OBJECTIVE), temperature=case.temperature
    )
    logprob_T = (leaf_TV / case.temperature).log_softmax(-1).gather(1, case.target_T[:, None])[:, 0]
    loss = (case.weight_T * values_T + case.slope_T * logprob_T).sum()
    (gradient_TV,) = torch.autograd.grad(loss, leaf_TV)
    for values_U, logprob_U, _ in shards:
        assert torch.allclose(values_U.double(), values_T, rtol=2e-5, atol=2e-5), name
        assert torch.allclose(logprob_U.double(), logprob_T, rtol=1e-5, atol=1e-5), name
    got_TV = torch.cat([gradient for _, _, gradient in shards], 1)
    assert (got_TV.double() - gradient_TV).abs().max() <= 1e-5 * gradient_TV.abs().max(), name


def test_a_policy_that_has_not_moved_has_reverse_kl():
    """By value and by gradient."""
    case = replace(ordinary(), temperature=0.8)
    same, kl = run(case, OBJECTIVE), run(case, TopK(1.0, 20, "tail", "student"))
    assert same.divergence_T is not None and kl.divergence_T is not None
    assert torch.allclose(same.divergence_T, kl.divergence_T, rtol=1e-5, atol=1e-6)
    assert (same.gradient_TV - kl.gradient_TV).abs().max() < 1e-5 * kl.gradient_TV.abs().max()


def test_an_outcome_that_was_never_sampled_has_no_say():
    """All mass of the old policy lies on its K tokens: there is no tail, wherever the student is now."""
    case = ordinary(rows=2, vocab_size=64)
    old_TV = torch.full_like(case.student_TV, float("-inf"))
    old_TV[:, :20] = 0.0
    logits = LogitRows(
        case.student_TV.clone(), case.teacher_TV, case.target_T, VocabShard(start=0, vocab_size=64), old_TV
    )
    rows = OBJECTIVE.evaluate(logits)
    assert rows.divergence_U.isfinite().all() and rows.slope_UJ[:, -1].eq(0).all()
    OBJECTIVE.write_gradient_(logits, rows, torch.ones(2), torch.zeros(2))
    assert logits.student_UV.isfinite().all()
