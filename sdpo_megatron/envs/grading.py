"""Problems, responses and grades put together."""

from collections.abc import Sequence

from sdpo_megatron.envs.base import Environment
from sdpo_megatron.records import Grade, Group, Problem, Rollout


def join_groups(problems: Sequence[Problem], rollouts_PG: Sequence[list[Rollout]]) -> list[Group]:
    """Returns each problem with its responses, not yet graded."""
    return [
        Group(problem=problem, rollouts_G=rollouts_G)
        for problem, rollouts_G in zip(problems, rollouts_PG, strict=True)
    ]


def grade_groups(groups_P: Sequence[Group], env: Environment) -> list[Group]:
    """Returns the same groups with a grade for each response. The environment judges answers; a response that ended
    inside its thought has none, and reward 0."""
    return [
        Group(
            problem=group.problem,
            rollouts_G=group.rollouts_G,
            grades_G=[_grade(env, group.problem, rollout) for rollout in group.rollouts_G],
        )
        for group in groups_P
    ]


def _grade(env: Environment, problem: Problem, rollout: Rollout) -> Grade:
    if rollout.finish_reason != "thinking":
        return env.grade(problem, rollout.text)
    tokens = len(rollout.response_ids_T)
    return Grade(
        reward=0.0,
        feedback=f"No answer came: the response ended after {tokens} tokens, inside its thought.",
        correct_format=False,
    )
