"""What the graded responses to a set of problems come to: avg@n, pass@k, maj@n, and how sure that is; and the exact
probability of canonical answers."""

import math
import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from sdpo_megatron.algorithm.metrics import mean
from sdpo_megatron.records import Group
from sdpo_megatron.run_dir.evaluations_file import ProblemResult

DOUBT = re.compile(
    r"\b(?:wait|hmm+|perhaps|maybe|actually|alternatively|seems|might|likely|check)\b", re.IGNORECASE
)
"""Words in which a response doubts itself; those that beanie00/self-distillation-analysis counts (arXiv 2603.24472)."""
RESAMPLED = 2_000
"""Sets of problems that are drawn for an interval: its ends then vary by about a twentieth of its width."""
CONFIDENCE = 0.95
EXACT = "exact_answer_prob"


def exact_answer_prob(logprobs_PT: Sequence[Sequence[float]]) -> float:
    """Returns the mean probability of answers, from the log-probabilities of their tokens at temperature 1: what
    sampling the same model for ever would find."""
    return mean(math.exp(sum(logprobs_T)) for logprobs_T in logprobs_PT)


def problem_results(groups_P: Sequence[Group], success_threshold: float) -> list[ProblemResult]:
    """Returns what each problem's responses came to; responses that could not be graded do not count."""
    return [
        ProblemResult(
            id=group.problem.id,
            graded=len(group.grades_G),
            correct=sum(grade.reward >= success_threshold for grade in group.grades_G),
            majority=_majority(group, success_threshold),
            domain=str(group.problem.metadata.get("domain", "")),
            difficulty=str(group.problem.metadata.get("difficulty", "")),
        )
        for group in groups_P
    ]


def measures(results_P: Sequence[ProblemResult], samples: int) -> dict[str, float]:
    """Returns the means over problems, n being `samples`; empty where nothing was graded.

    avg@n is the mean share of right responses, with the ends of its 95% interval; pass@k, for each power of two up to
    n, the chance that one of k responses is right, unbiased (arXiv 2107.03374, Eq. 1); maj@n the share of problems
    whose commonest answer is right. Domains and difficulties have their own avg@n.
    """
    graded_P = [result for result in results_P if result.graded]
    if not graded_P:
        return {}
    shares_P = [result.correct / result.graded for result in graded_P]
    name = f"avg@{samples}"
    low, high = interval(shares_P)
    found = {name: mean(shares_P), f"{name}/low": low, f"{name}/high": high}
    for k in (1 << power for power in range(1, samples.bit_length())):
        enough_P = [result for result in graded_P if result.graded >= k]
        if enough_P:
            found[f"pass@{k}"] = mean(pass_at_k(result.graded, result.correct, k) for result in enough_P)
    majorities_P = [result.majority for result in graded_P if result.majority is not None]
    if samples > 1 and majorities_P:
        found[f"maj@{samples}"] = mean(majorities_P)
    for part in ("domain", "difficulty"):
        by_value: dict[str, list[float]] = defaultdict(list)
        for result, share in zip(graded_P, shares_P, strict=True):
            if value := getattr(result, part):
                by_value[value].append(share)
        found |= {f"{part}/{value}/{name}": mean(shares) for value, shares in sorted(by_value.items())}
    return found


def doubt_words(groups_P: Sequence[Group]) -> float:
    """Returns the mean number of words of doubt in a response, its thought included."""
    texts = [f"{rollout.thought}\n{rollout.text}" for group in groups_P for rollout in group.rollouts_G]
    return mean(len(DOUBT.findall(text)) for text in texts)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Returns the chance that at least one of k responses, drawn from n without putting back, is right."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def interval(values_P: Sequence[float]) -> tuple[float, float]:
    """Returns the ends of the 95% bootstrap interval of the mean, by percentiles, problems being what is drawn again.

    It knows the problems' spread alone: where all values are the same it has no width."""
    values = np.asarray(values_P, dtype=np.float64)
    count = len(values)
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=RESAMPLED)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn @ values / count, [tail, 1 - tail])
    return float(low), float(high)


def _majority(group: Group, success_threshold: float) -> float | None:
    """The share of right responses among those of the commonest answers: a tie is decided by lot. 0 where no response
    has an answer, None where the grader never says one."""
    graded_G = group.grades_G
    if all(grade.answer is None for grade in graded_G):
        return None
    by_answer: dict[str, list[bool]] = defaultdict(list)
    for grade in graded_G:
        if grade.answer:
            by_answer[grade.answer].append(grade.reward >= success_threshold)
    if not by_answer:
        return 0.0
    most = max(map(len, by_answer.values()))
    return mean(mean(right) for right in by_answer.values() if len(right) == most)
