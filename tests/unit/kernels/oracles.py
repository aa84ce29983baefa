"""What the kernels must give, in NumPy float64, written from the published formulas and not from the package.

A divergence D is seen as a function of the student's probabilities p of outcomes; `pull` is p dD/dp of each of them,
and the softmax turns it into the gradient by the logits: (pull - p sum(pull)) / temperature. `test_oracles.py` holds
the gradients equal to finite differences of the values.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdpo_megatron.kernels.objective import FullVocabulary, TopK

Array = NDArray[np.float64]


class Expected(NamedTuple):
    value_T: Array
    gradient_TV: Array


def log_softmax(logits_TV: Array, temperature: float = 1.0) -> Array:
    above_TV = (logits_TV - logits_TV.max(-1, keepdims=True)) / temperature
    return above_TV - np.log(np.exp(above_TV).sum(-1, keepdims=True))


def logprob(logits_TV: Array, target_T: NDArray[np.int64], temperature: float) -> Expected:
    log_p_TV = log_softmax(logits_TV, temperature)
    rows = np.arange(len(target_T))
    gradient_TV = -np.exp(log_p_TV)
    gradient_TV[rows, target_T] += 1.0
    return Expected(log_p_TV[rows, target_T], gradient_TV / temperature)


def entropy(logits_TV: Array, temperature: float) -> Array:
    log_p_TV = log_softmax(logits_TV, temperature)
    return -_times(np.exp(log_p_TV), log_p_TV).sum(-1)


def divergence(student_TV: Array, teacher_TV: Array, alpha: float, temperature: float) -> Expected:
    """1: KL(p || q); 0: KL(q || p); between: (1 - alpha) KL(p || m) + alpha KL(q || m), m = (1 - alpha) p + alpha q."""
    log_p_TV, log_q_TV = log_softmax(student_TV, temperature), log_softmax(teacher_TV, temperature)
    value_T, pull_TV = _of_outcomes(log_p_TV, log_q_TV, alpha)
    return Expected(value_T, _through_softmax(pull_TV, np.exp(log_p_TV)) / temperature)


def top_k(
    student_TV: Array,
    teacher_TV: Array,
    alpha: float,
    k: int,
    rest: str,
    support: str,
    temperature: float,
) -> Expected:
    """Equation 11 of arXiv 2601.20802: K tokens and one outcome for all others; or the K alone, made to sum to one."""
    log_p_TV, log_q_TV = log_softmax(student_TV, temperature), log_softmax(teacher_TV, temperature)
    chosen_TV = student_TV if support == "student" else teacher_TV
    inside_TK = np.argsort(-chosen_TV, axis=-1, kind="stable")[:, :k]
    log_p_TK, log_q_TK = (np.take_along_axis(x, inside_TK, -1) for x in (log_p_TV, log_q_TV))
    gradient_TV = np.zeros_like(log_p_TV)
    if rest == "renormalise":
        log_p_TK = log_p_TK - _log_sum(log_p_TK)[:, None]
        value_T, pull_TK = _of_outcomes(log_p_TK, log_q_TK - _log_sum(log_q_TK)[:, None], alpha)
        gradient_TK = _through_softmax(pull_TK, np.exp(log_p_TK))
        np.put_along_axis(gradient_TV, inside_TK, gradient_TK / temperature, -1)
        return Expected(value_T, gradient_TV)
    outside_TV = np.ones_like(log_p_TV, dtype=bool)
    np.put_along_axis(outside_TV, inside_TK, False, -1)
    tails = [_log_sum(np.where(outside_TV, log, -np.inf))[:, None] for log in (log_p_TV, log_q_TV)]
    value_T, pull_TK = _of_outcomes(
        np.concatenate([log_p_TK, tails[0]], -1), np.concatenate([log_q_TK, tails[1]], -1), alpha
    )
    share_TV = np.exp(_minus(np.where(outside_TV, log_p_TV, -np.inf), tails[0]))  # of the tail's pull
    pull_TV = share_TV * pull_TK[:, -1:]
    np.put_along_axis(pull_TV, inside_TK, pull_TK[:, :-1], -1)
    return Expected(value_T, _through_softmax(pull_TV, np.exp(log_p_TV)) / temperature)


def _of_outcomes(log_p: Array, log_q: Array, alpha: float) -> tuple[Array, Array]:
    """(D, p dD/dp) of outcomes that sum to one."""
    p, q = np.exp(log_p), np.exp(log_q)
    if alpha == 1:
        return _kl(p, log_p, log_q), p + _times(p, _minus(log_p, log_q))
    if alpha == 0:
        return _kl(q, log_q, log_p), -q
    log_m = np.logaddexp(np.log(1 - alpha) + log_p, np.log(alpha) + log_q)
    value = (1 - alpha) * _kl(p, log_p, log_m) + alpha * _kl(q, log_q, log_m)
    log_p_over_m = _minus(log_p, log_m)
    p_over_m = np.exp(log_p_over_m)
    of_first = _times(p, log_p_over_m) + p - (1 - alpha) * p * p_over_m
    return value, (1 - alpha) * (of_first - alpha * q * p_over_m)


def _kl(a: Array, log_a: Array, log_b: Array) -> Array:
    return _times(a, _minus(log_a, log_b)).sum(-1)


def _through_softmax(pull: Array, p: Array) -> Array:
    return pull - p * pull.sum(-1, keepdims=True)


def _log_sum(log: Array) -> Array:
    top = log.max(-1)
    sums = np.exp(_minus(log, top[:, None])).sum(-1)
    return top + np.log(sums, out=np.zeros_like(sums), where=sums > 0)


def _minus(a: Array, b: Array) -> Array:
    """a - b; minus infinity where a is, whatever b is."""
    return np.subtract(a, b, out=np.full_like(a, -np.inf), where=np.isfinite(a))


def _times(probability: Array, log: Array) -> Array:
    """0 where the probability is 0, whatever the logarithm is."""
    return np.multiply(probability, log, out=np.zeros_like(log), where=probability > 0)


def of_objective(
    student_TV: Array, teacher_TV: Array, objective: FullVocabulary | TopK, temperature: float
) -> Expected:
    if isinstance(objective, FullVocabulary):
        return divergence(student_TV, teacher_TV, objective.alpha, temperature)
    return top_k(student_TV, teacher_TV, **vars(objective), temperature=temperature)
