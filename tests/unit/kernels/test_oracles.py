"""The float64 oracles: gradients equal finite differences, and the package's definitions equal the oracles."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from sdpo_megatron.kernels.divergence import divergence_definition
from sdpo_megatron.kernels.softmax import logprob_definition
from sdpo_megatron.kernels.top_k import top_k_definition
from tests.unit.kernels import oracles
from tests.unit.kernels.cases import ordinary
from tests.unit.kernels.oracles import Array, Expected

TEMPERATURE = 1.3
ALPHAS = [0.0, 0.3, 0.5, 1.0]
RESTS, SUPPORTS = ["tail", "renormalise"], ["student", "teacher"]


def finite_difference(value: Callable[[Array], Array], logits_TV: Array, step: float = 1e-5) -> Array:
    gradient_TV = np.empty_like(logits_TV)
    for column in range(logits_TV.shape[1]):
        shift_V = step * np.eye(logits_TV.shape[1])[column]
        gradient_TV[:, column] = (value(logits_TV + shift_V) - value(logits_TV - shift_V)) / (2 * step)
    return gradient_TV


def pair(vocab_size: int) -> tuple[Array, Array]:
    case = ordinary(rows=3, vocab_size=vocab_size)
    return case.student_TV.double().numpy(), case.teacher_TV.double().numpy()


def holds(of: Callable[[Array], Expected]) -> None:
    student_TV, _ = pair(11)
    np.testing.assert_allclose(
        of(student_TV).gradient_TV, finite_difference(lambda x_TV: of(x_TV).value_T, student_TV), atol=1e-9
    )


def test_gradient_of_the_log_probability():
    holds(lambda x_TV: oracles.logprob(x_TV, np.array([0, 7, 10]), TEMPERATURE))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradient_of_the_divergence(alpha):
    _, teacher_TV = pair(11)
    holds(lambda x_TV: oracles.divergence(x_TV, teacher_TV, alpha, TEMPERATURE))


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradient_of_the_divergence_on_k_tokens(alpha, rest, support):
    _, teacher_TV = pair(11)
    holds(lambda x_TV: oracles.top_k(x_TV, teacher_TV, alpha, 4, rest, support, TEMPERATURE))


def definition_holds(
    of: Callable[[torch.Tensor], torch.Tensor], expected: Expected, logits_TV: Array | None = None
) -> None:
    student_TV = torch.from_numpy(pair(203)[0] if logits_TV is None else logits_TV).requires_grad_()
    value_T = of(student_TV)
    (gradient_TV,) = torch.autograd.grad(value_T.sum(), student_TV)
    np.testing.assert_allclose(value_T.detach().numpy(), expected.value_T, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(gradient_TV.numpy(), expected.gradient_TV, rtol=1e-9, atol=1e-12)


def test_definition_of_the_log_probability():
    target_T = np.array([0, 100, 202])
    definition_holds(
        lambda x_TV: logprob_definition(x_TV, torch.from_numpy(target_T), temperature=TEMPERATURE),
        oracles.logprob(pair(203)[0], target_T, TEMPERATURE),
    )


@pytest.mark.parametrize("alpha", ALPHAS)
def test_definition_of_the_divergence(alpha):
    teacher_TV = pair(203)[1]
    definition_holds(
        lambda x_TV: divergence_definition(
            x_TV, torch.from_numpy(teacher_TV), alpha=alpha, temperature=TEMPERATURE
        ),
        oracles.divergence(pair(203)[0], teacher_TV, alpha, TEMPERATURE),
    )


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("k", [20, 100])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_definition_of_the_divergence_on_k_tokens(alpha, k, rest, support):
    student_TV, teacher_TV = pair(203)
    definition_holds(
        lambda x_TV: top_k_definition(
            *(x_TV, torch.from_numpy(teacher_TV)),
            alpha=alpha,
            k=k,
            rest=rest,
            support=support,
            temperature=TEMPERATURE,
        ),
        oracles.top_k(student_TV, teacher_TV, alpha, k, rest, support, TEMPERATURE),
    )


@pytest.mark.parametrize("alpha", ALPHAS)
def test_definition_where_one_minus_the_mass_has_no_digits(alpha):
    student_TV, teacher_TV = pair(203)
    inside_TK = np.argsort(-student_TV, axis=-1)[:, :20]
    np.put_along_axis(student_TV, inside_TK, np.take_along_axis(student_TV, inside_TK, -1) + 60.0, -1)
    how: dict[str, Any] = {"alpha": alpha, "k": 20, "rest": "tail", "support": "student"}
    how["temperature"] = TEMPERATURE
    definition_holds(
        lambda x_TV: top_k_definition(x_TV, torch.from_numpy(teacher_TV), **how),
        oracles.top_k(student_TV, teacher_TV, **how),
        student_TV,
    )


@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_definition_on_all_tokens_is_the_divergence(alpha, rest):
    """There is no tail then."""
    student_TV, teacher_TV = pair(203)
    definition_holds(
        lambda x_TV: top_k_definition(
            *(x_TV, torch.from_numpy(teacher_TV)),
            alpha=alpha,
            k=203,
            rest=rest,
            support="student",
            temperature=TEMPERATURE,
        ),
        oracles.divergence(student_TV, teacher_TV, alpha, TEMPERATURE),
    )
