"""Divergences on K tokens, plain and Triton, against float64."""

import itertools
from dataclasses import replace

import pytest
import torch

from sdpo_megatron.kernels.objective import TopK
from sdpo_megatron.kernels.vocab import VocabShard
from tests.unit.kernels import oracles
from tests.unit.kernels.cases import (
    BFLOAT16_GRADIENT,
    CASES,
    Case,
    check,
    in_bfloat16,
    ordinary,
    padded,
    run_top_k,
    student_without_some,
    without,
)

EVERYTHING = [
    TopK(alpha, k, rest, support)
    for alpha in (0.0, 0.5, 1.0)
    for k in (20, 100)
    for rest in ("tail", "renormalise")
    for support in ("student", "teacher")
]
SOME = [TopK(0.0, 20, "tail", "teacher"), TopK(0.5, 100, "tail", "student")]
SOME += [TopK(1.0, 20, "renormalise", "student")]
SHARP = ["peaked", "peaked, sharded", "far from zero", "spread by thousands"]
"""The K tokens may have all of the mass but 1e-7 or less."""
OTHERS = [name for name in CASES if name not in SHARP and name != "one row" and "bfloat16" not in name]


def expected(case: Case, objective: TopK, least_tail: float = 0.0) -> oracles.Expected:
    return oracles.top_k(
        *(case.exact(case.student_TV), case.exact(case.teacher_TV)),
        *(objective.alpha, objective.k, objective.rest, objective.support, case.temperature, least_tail),
    )


def holds(case: Case, objective: TopK, least_tail: float = 0.0) -> None:
    check(case, run_top_k(case, objective), expected(case, objective, least_tail))


@pytest.mark.parametrize("objective", EVERYTHING, ids=str)
def test_values_and_gradient(objective):
    holds(ordinary(), objective)


@pytest.mark.parametrize("objective", SOME, ids=str)
@pytest.mark.parametrize("name", ["ordinary", "garbage in the last shard"])
def test_on_either_kernels(name, objective, device):
    """Which are the policy gradient's."""
    holds(CASES[name]().to(device), objective)


@pytest.mark.parametrize("objective", SOME, ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_values_and_gradient_of_hard_logits(name, objective):
    holds(CASES[name](), replace(objective, k=min(objective.k, 37)))


@pytest.mark.parametrize("support", ["student", "teacher"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", SHARP)
def test_a_tail_that_float32_cannot_tell_from_none_counts_as_1e_7(name, alpha, support):
    """As in the authors' code. The tail is one minus the mass of the K, so that it has no digits below that."""
    holds(CASES[name](), TopK(alpha, 20, "tail", support), least_tail=1e-7)


@pytest.mark.parametrize("up", [3.0, 6.0, 9.0])
def test_a_small_tail_has_the_digits_that_one_minus_the_mass_has(up):
    """Its error is that of the mass, some 2**-23, and counts as often as the teacher's tail is larger than its own."""
    case, objective = ordinary(), TopK(0.0, 20, "tail", "student")
    inside_TK = case.student_TV.topk(20).indices
    case = replace(case, student_TV=case.student_TV.scatter_add(1, inside_TK, torch.full((6, 20), up)))
    tails_T = [
        1.0 - x_TV.double().softmax(-1).gather(1, inside_TK).sum(-1)
        for x_TV in (case.student_TV, case.teacher_TV)
    ]
    got_T = run_top_k(case, objective).divergence_T
    assert got_T is not None
    error_T = (got_T.double() - torch.from_numpy(expected(case, objective).value_T)).abs()
    assert (error_T <= 4 * 2**-23 * (1.0 + tails_T[1] / tails_T[0])).all()


@pytest.mark.parametrize("objective", SOME, ids=str)
def test_bfloat16(objective, device):
    holds(without_ties(objective).to(device), objective)


def without_ties(objective: TopK) -> Case:
    """bfloat16 logits among which there is no doubt which are the K largest."""
    for seed in itertools.count():
        case = in_bfloat16(ordinary(seed=seed), BFLOAT16_GRADIENT)
        chosen_TV = case.student_TV if objective.support == "student" else case.teacher_TV
        largest_TK = chosen_TV.topk(objective.k + 1, dim=-1).values
        if (largest_TK[:, -2] > largest_TK[:, -1]).all():
            return case
    raise AssertionError


@pytest.mark.parametrize("name", SHARP)
def test_without_a_tail_peaks_are_as_exact(name):
    holds(CASES[name](), TopK(1.0, 20, "renormalise", "student"))


@pytest.mark.parametrize("objective", EVERYTHING[8:], ids=str)
def test_tokens_that_the_student_alone_rules_out(objective):
    """alpha = 0 is infinite there."""
    holds(student_without_some(blocks=False), objective)


@pytest.mark.parametrize("support", ["student", "teacher"])
@pytest.mark.parametrize(("shards", "columns"), [(1, 42), (3, 14), (3, 21)])
def test_more_tokens_asked_for_than_are_possible(support, shards, columns):
    """Seven are; none counts twice, whichever shard's columns have to fill the places."""
    case = padded(42, shards, columns)
    logits = [
        without(replace(case, student_TV=x_TV, teacher_TV=x_TV), column).student_TV
        for x_TV in (case.student_TV, case.teacher_TV)
        for column in [torch.tensor([*range(12), *range(19, 42)])]
    ]
    case = replace(case, student_TV=logits[0], teacher_TV=logits[1], target_T=12 + case.target_T % 7)
    holds(case, TopK(1.0, 20, "renormalise", support))


def test_the_supports_mass():
    case = ordinary()
    shard = VocabShard(start=0, vocab_size=case.vocab_size)
    rows = TopK(1.0, 20, "tail", "student").rows(case.student_TV, case.teacher_TV, case.target_T, shard)
    mass_T = case.student_TV.double().softmax(-1).topk(20).values.sum(-1)
    torch.testing.assert_close(rows.mass_U.double(), mass_T, rtol=1e-6, atol=0)
    assert rows.support_UK.equal(case.student_TV.topk(20).indices)
