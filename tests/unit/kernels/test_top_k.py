"""Divergences on K tokens, plain and Triton, against float64."""

import itertools
from dataclasses import replace

import pytest
import torch

from sdpo_megatron.kernels.objective import FullVocabulary, TopK
from sdpo_megatron.kernels.rows import LogitRows
from sdpo_megatron.kernels.top_k import Rest, Support
from sdpo_megatron.kernels.vocab import VocabShard
from tests.unit.kernels import oracles
from tests.unit.kernels.cases import (
    BFLOAT16_GRADIENT,
    CASES,
    FLOAT32_GRADIENT,
    INFINITY,
    Case,
    check,
    holds,
    in_bfloat16,
    ordinary,
    padded,
    run,
    student_without_some,
    without,
)

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
"""NumPy's, under Triton's interpreter: nothing overflows, nothing is undefined."""

EVERYTHING = [
    TopK(alpha, k, rest, support)
    for alpha in (0.0, 0.5, 1.0)
    for k in (20, 100)
    for rest in ("tail", "renormalise")
    for support in ("student", "teacher")
]
SOME = [TopK(0.0, 20, "tail", "teacher"), TopK(0.5, 100, "tail", "student")]
SOME += [TopK(1.0, 20, "renormalise", "student")]
HARD = [TopK(alpha, 20, "tail", support) for alpha in (0.0, 0.5, 1.0) for support in ("student", "teacher")]
HARD += [TopK(0.5, 37, "tail", "student"), TopK(1.0, 20, "renormalise", "student")]
NO_TIES = [name for name in CASES if name != "one row" and "bfloat16" not in name]


def test_values_and_gradient(subtests: pytest.Subtests):
    for objective in EVERYTHING:
        with subtests.test(objective=objective):
            holds(ordinary(), objective)


def test_on_either_kernels(device: str, subtests: pytest.Subtests):
    """Which are the log-probability's."""
    for name, objective in (
        ("ordinary", SOME[0]),
        ("ordinary", SOME[2]),
        ("garbage in the last shard", SOME[1]),
    ):
        with subtests.test(name, objective=objective):
            holds(CASES[name]().to(device), objective)


def test_values_and_gradient_of_hard_logits(subtests: pytest.Subtests):
    for name in NO_TIES:
        for objective in HARD:
            with subtests.test(name, objective=objective):
                holds(CASES[name](), objective)


def test_bfloat16(device: str, subtests: pytest.Subtests):
    for objective in SOME:
        with subtests.test(objective=objective):
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


def test_tokens_that_the_student_alone_rules_out(subtests: pytest.Subtests):
    """alpha = 0 is infinite there."""
    for objective in EVERYTHING:
        if objective.alpha:
            with subtests.test(objective=objective):
                holds(student_without_some(blocks=False), objective)


SMALLEST = 1e-43
"""Some 70 times the smallest float32: sums of such have no more digits."""
ENDS_AND_MIDDLE = (0.0, 0.5, 1.0)
RESTS: tuple[Rest, ...] = ("tail", "renormalise")
SUPPORTS: tuple[Support, ...] = ("student", "teacher")


def test_more_tokens_asked_for_than_are_possible(subtests: pytest.Subtests):
    """Seven are; none counts twice, whichever shard's columns have to fill the places."""
    for (shards, columns), alpha, rest, support in itertools.product(
        ((1, 42), (3, 14), (3, 21)), ENDS_AND_MIDDLE, RESTS, SUPPORTS
    ):
        with subtests.test(shards=shards, columns=columns, alpha=alpha, rest=rest, support=support):
            case = padded(42, shards, columns)
            logits = [
                without(replace(case, student_TV=x_TV, teacher_TV=x_TV), column).student_TV
                for x_TV in (case.student_TV, case.teacher_TV)
                for column in [torch.tensor([*range(12), *range(19, 42)])]
            ]
            case = replace(case, student_TV=logits[0], teacher_TV=logits[1], target_T=12 + case.target_T % 7)
            holds(case, TopK(alpha, 20, rest, support))


def test_all_tokens(device: str, kernels: str, subtests: pytest.Subtests):
    """There is no tail, and the divergence is that of the whole vocabulary."""
    for shards, alpha, rest, support in itertools.product((1, 3), ENDS_AND_MIDDLE, RESTS, SUPPORTS):
        if kernels == "triton" and (shards == 3 or alpha == 0.5 or support == "teacher"):
            continue
        with subtests.test(shards=shards, alpha=alpha, rest=rest, support=support):
            case = padded(42, shards, 42 + 7 if shards == 1 else 21).to(device)
            check(case, run(case, TopK(alpha, 42, rest, support)), FullVocabulary(alpha))


RAISED = [("student_TV",), ("teacher_TV",), ("student_TV", "teacher_TV")]
NATS = (3.0, 6.0, 9.0, 30.0, 80.0)


def raised(who: tuple[str, ...], up: float, support: Support) -> Case:
    """The 20 tokens that `support` chooses stand out."""
    case = ordinary()
    inside_TK = vars(case)[f"{support}_TV"].topk(20).indices
    more_TK = torch.full(inside_TK.shape, up)
    return replace(case, **{name: vars(case)[name].scatter_add(1, inside_TK, more_TK) for name in who})


def test_a_small_tail(subtests: pytest.Subtests):
    for who, up, alpha, support in itertools.product(RAISED, NATS, ENDS_AND_MIDDLE, SUPPORTS):
        with subtests.test(who="+".join(who), up=up, alpha=alpha, support=support):
            holds(raised(who, up, support), TopK(alpha, 20, "tail", support))


def test_the_gradient_by_a_small_tail_has_all_digits(subtests: pytest.Subtests):
    """Its largest entry measures it here: next to the support's it would vanish. Where one model alone is sure, that
    is no difference of nearly equal numbers."""
    for who, up, alpha, support in itertools.product(RAISED[:2], NATS, ENDS_AND_MIDDLE, SUPPORTS):
        with subtests.test(who="+".join(who), up=up, alpha=alpha, support=support):
            case, objective = raised(who, up, support), TopK(alpha, 20, "tail", support)
            case = replace(case, weight_T=torch.ones(6), slope_T=torch.zeros(6))
            outside_TV = torch.ones(6, case.vocab_size, dtype=torch.bool)
            outside_TV.scatter_(1, vars(case)[f"{support}_TV"].topk(20).indices, False)
            exact = oracles.of_objective(
                case.exact(case.student_TV), case.exact(case.teacher_TV), objective, case.temperature
            )
            of_tail_TV = torch.from_numpy(exact.gradient_TV) * outside_TV
            error_TV = (run(case, objective).gradient_TV.double() - of_tail_TV) * outside_TV
            bound_T1 = FLOAT32_GRADIENT * of_tail_TV.abs().amax(-1, keepdim=True)
            assert (error_TV.abs() <= bound_T1 + SMALLEST).all()


def test_targets_inside_and_outside_the_support(device: str, kernels: str, subtests: pytest.Subtests):
    """The likeliest of all, the last inside, the first outside, the least likely; each with a policy gradient."""
    for shards, alpha, support in itertools.product((1, 2), ENDS_AND_MIDDLE, SUPPORTS):
        if kernels == "triton" and (alpha != 1.0 or support == "teacher"):
            continue
        with subtests.test(shards=shards, alpha=alpha, support=support):
            slope_T = torch.tensor([0.7, -0.4, 0.3, 0.6, 0.5, -0.2])
            case = replace(ordinary(), shards=shards, slope_T=slope_T)
            order_TV = vars(case)[f"{support}_TV"].argsort(descending=True)
            target_T = order_TV[torch.arange(6), torch.tensor([0, 0, 19, 20, 20, 529])]
            holds(replace(case, target_T=target_T).to(device), TopK(alpha, 20, "tail", support))


def test_a_tail_that_the_student_rules_out_has_no_gradient(device: str, subtests: pytest.Subtests):
    """Forward KL is infinite there; padding columns, minus infinity to the kernels too, still have 0."""
    for shards in (1, 2):
        with subtests.test(shards=shards):
            case = padded(42, shards, 56 // shards)
            outside_TV = torch.ones(6, 42, dtype=torch.bool)
            outside_TV.scatter_(1, case.teacher_TV[:, :42].topk(20).indices, False)
            case.student_TV[:, :42].masked_fill_(outside_TV, -INFINITY)
            target_T = case.teacher_TV[:, :42].argmax(-1)
            case = replace(case, target_T=target_T).to(device)
            got_TV = run(case, TopK(0.0, 20, "tail", "teacher")).gradient_TV.cpu()
            assert got_TV.isfinite().all()
            assert not got_TV[:, 42:].any() and not got_TV[:, :42][outside_TV].any()


def test_the_supports_mass():
    case = ordinary()
    shard = VocabShard(start=0, vocab_size=case.vocab_size)
    logits = LogitRows(case.student_TV, case.teacher_TV, case.target_T, shard)
    rows = TopK(1.0, 20, "tail", "student").evaluate(logits)
    mass_T = case.student_TV.double().softmax(-1).topk(20).values.sum(-1)
    assert rows.mass_U is not None
    torch.testing.assert_close(rows.mass_U.double(), mass_T, rtol=1e-6, atol=0)
    assert rows.support_UK.equal(case.student_TV.topk(20).indices)


@pytest.mark.parametrize("valid", [5, 20, 21])
def test_a_tail_of_no_tokens_or_of_minus_infinity_in_bfloat16(device: str, valid: int, subtests):
    """-1e30, which stands for minus infinity, is no number of bfloat16's."""
    rests: list[Rest] = ["tail", "renormalise"]
    for rest in rests:
        with subtests.test(rest=rest):
            student_UV, teacher_UV = torch.randn(2, 3, 64, device=device).bfloat16()
            student_UV[:, valid:] = teacher_UV[:, valid:] = float("nan")
            student_UV[0, 1:valid] = float("-inf")
            objective = TopK(1.0, min(20, valid), rest, "student")
            target_U = torch.zeros(3, dtype=torch.int64, device=device)
            logits = LogitRows(student_UV, teacher_UV, target_U, VocabShard(start=0, vocab_size=valid))
            rows = objective.evaluate(logits)
            weight_U = torch.ones(3, device=device)
            objective.write_gradient_(logits, rows, weight_U, 0 * weight_U)
            assert rows.divergence_U.isfinite().all() and rows.student.entropy_U.isfinite().all()
            assert logits.student_UV.isfinite().all()
