"""avg@n, pass@k, maj@n and their interval, against what they are by definition."""

import itertools
import math

import numpy as np
import pytest

from sdpo_megatron.evaluation.measures import doubt_words, interval, measures, pass_at_k, problem_results
from sdpo_megatron.records import Group, Problem, Ungraded
from sdpo_megatron.run_dir.evaluations_file import ProblemResult
from tests.unit.evaluation.cases import PROBLEMS, group, rollout


@pytest.mark.parametrize("n,correct,k", [(5, 2, 1), (5, 2, 3), (5, 0, 2), (5, 5, 2), (8, 1, 8), (4, 3, 2)])
def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_response(n: int, correct: int, k: int):
    draws = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
    assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_the_numbers_of_two_problems():
    groups_P = [
        group(PROBLEMS[0], [1, 0, 0, 0], ["4", "5", "5", ""]),
        group(PROBLEMS[1], [1, 1, 1, 0], ["7", "7", "7", "8"]),
    ]
    results_P = problem_results(groups_P, 0.5)
    assert [(r.id, r.graded, r.correct, r.majority) for r in results_P] == [("p0", 4, 1, 0), ("p1", 4, 3, 1)]
    found = measures(results_P, 4)
    assert found["avg@4"] == 0.5 and found["pass@4"] == 1.0 and found["maj@4"] == 0.5
    assert found["pass@2"] == pytest.approx((0.5 + 1.0) / 2)
    assert set(found) == {"avg@4", "avg@4/low", "avg@4/high", "pass@2", "pass@4", "maj@4"}


def test_a_tie_is_decided_by_lot_and_no_answer_is_no_vote():
    def majority(answers: list[str | None], rewards: list[float]) -> float | None:
        return problem_results([group(PROBLEMS[0], rewards, answers)], 0.5)[0].majority

    assert majority(["4", "5"], [1, 0]) == 0.5
    assert majority(["", "", "4"], [0, 0, 1]) == 1.0
    assert majority(["", ""], [0, 0]) == 0.0
    assert majority([None, None], [1, 0]) is None


def test_domains_and_difficulties_have_their_own():
    problems = [
        Problem(id=str(i), messages=[], metadata={"domain": domain, "difficulty": level})
        for i, (domain, level) in enumerate([("algebra", 1), ("algebra", 5), ("geometry", 5)])
    ]
    groups_P = [group(problem, [float(i > 0)]) for i, problem in enumerate(problems)]
    found = measures(problem_results(groups_P, 0.5), 1)
    assert found["domain/algebra/avg@1"] == 0.5 and found["domain/geometry/avg@1"] == 1.0
    assert found["difficulty/1/avg@1"] == 0.0 and found["difficulty/5/avg@1"] == 1.0


def test_what_could_not_be_graded_does_not_count():
    lost = Ungraded(rollout=rollout(), cause="x")
    partly = Group(
        problem=PROBLEMS[0],
        rollouts_G=[rollout()],
        grades_G=group(PROBLEMS[0], [1]).grades_G,
        ungraded={1: lost},
    )
    never = Group(problem=PROBLEMS[1], rollouts_G=[], ungraded={0: lost, 1: lost})
    found = measures(problem_results([partly, never], 0.5), 2)
    assert found == {"avg@2": 1.0, "avg@2/low": 1.0, "avg@2/high": 1.0}
    assert measures(problem_results([never], 0.5), 2) == {}


def test_the_interval_covers_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        low, high = interval(rng.binomial(1, 0.3, size=100).tolist())
        covered += low <= 0.3 <= high
    assert 180 <= covered <= 199


def test_the_interval_is_that_of_drawing_problems_again_and_shrinks_with_them():
    values = [0.0, 1.0] * 50
    low, high = interval(values)
    assert (low, high) == interval(values)
    half = 1.96 * 0.5 / math.sqrt(100)
    assert low == pytest.approx(0.5 - half, abs=0.02) and high == pytest.approx(0.5 + half, abs=0.02)
    assert interval([0.25]) == (0.25, 0.25)


def test_words_of_doubt_are_whole_words_of_thought_and_answer():
    texts = [("Wait, maybe it likely is.", "Hmm. Await checkers"), ("4", "")]
    groups_P = [
        Group(problem=PROBLEMS[0], rollouts_G=[rollout(text, thought=thought)]) for text, thought in texts
    ]
    assert doubt_words(groups_P) == 2.0


def test_a_result_keeps_what_makes_it():
    result = ProblemResult(id="a", graded=2, correct=1)
    assert measures([result], 2)["avg@2"] == 0.5
