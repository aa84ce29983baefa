import pytest

from sdpo_megatron.algorithm.metrics import (
    environment_metrics,
    group_metrics,
)
from sdpo_megatron.records import FinishReason, Grade, Group, Message, Problem, Rollout, Ungraded

PROBLEM = Problem(id="p", messages=[Message(role="user", content="?")])


def rollout(tokens: int, finish_reason: FinishReason = "stop") -> Rollout:
    return Rollout(
        prompt_ids=[1],
        response_ids_T=[0] * tokens,
        rollout_logprobs_T=[0.0] * tokens,
        loss_mask_T=[1] * tokens,
        weight_spans=[],
        finish_reason=finish_reason,
        text="",
    )


GROUPS = [
    Group(
        problem=PROBLEM,
        rollouts_G=[rollout(2), rollout(4, "length")],
        grades_G=[Grade(reward=1.0), Grade(reward=0.2, correct_format=False)],
    ),
    Group(
        problem=PROBLEM,
        rollouts_G=[rollout(6), rollout(8, "thinking")],
        grades_G=[Grade(reward=0.0), Grade(reward=0.4)],
    ),
]


def test_environment_metrics():
    assert environment_metrics(GROUPS, 0.5) == pytest.approx(
        {
            "env/all/ungraded_fraction": 0.0,
            "env/all/correct": 0.25,
            "env/all/reward/total": 0.4,
            "env/all/format_fraction": 0.75,
            "env/all/truncated_fraction": 0.25,
            "env/all/unfinished_thought_fraction": 0.25,
            "env/all/response_length/mean": 5.0,
            "env/all/response_length/max": 8.0,
        }
    )
    assert environment_metrics(GROUPS, 0.4)["env/all/correct"] == 0.5
    assert environment_metrics([], 0.5) == {}


def partly(*places: int) -> Group:
    """A group of four of which these could be graded, each a success; the second has a number of its own."""
    left = {g: Ungraded(rollout=rollout(100), cause="c") for g in range(4) if g not in places}
    grades_G = [Grade(reward=1.0, metrics={"tests": 0.5} if g == 1 else {}) for g in places]
    rollouts_G = [rollout(2) for _ in places]
    return Group(problem=PROBLEM, rollouts_G=rollouts_G, grades_G=grades_G, ungraded=left)


def test_what_could_not_be_graded_counts_for_nothing_but_its_own_share():
    groups_P = [partly(0, 1), partly()]
    metrics = environment_metrics(groups_P, 0.5)
    assert metrics["env/all/ungraded_fraction"] == 0.75
    assert metrics["env/all/correct"] == 1.0 and metrics["env/all/response_length/max"] == 2.0
    assert metrics["env/all/tests"] == 0.5
    assert group_metrics(groups_P, 0.5) == {
        "sdpo/groups_total": 2,
        "sdpo/groups_with_success": 1,
        "sdpo/success_fraction": 0.5,
        "sdpo/mean_group_success_rate": 1.0,
    }
    assert environment_metrics([partly()], 0.5) == {"env/all/ungraded_fraction": 1.0}


def test_group_metrics():
    assert group_metrics(GROUPS, 0.5) == {
        "sdpo/groups_total": 2,
        "sdpo/groups_with_success": 1,
        "sdpo/success_fraction": 0.5,
        "sdpo/mean_group_success_rate": 0.25,
    }
    assert group_metrics([], 0.5)["sdpo/success_fraction"] == 0
