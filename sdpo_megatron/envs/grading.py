"""Problems, responses and grades put together."""

from collections.abc import Sequence

from sdpo_megatron.envs.base import Environment
from sdpo_megatron.records import Group, Problem, Rollout


def join_groups(problems: Sequence[Problem], rollouts_PG: Sequence[list[Rollout]]) -> list[Group]:
    """Returns each problem with its responses, not yet graded."""
    return [
        Group(problem=problem, rollouts_G=rollouts_G)
        for problem, rollouts_G in zip(problems, rollouts_PG, strict=True)
    ]


def grade_groups(groups_P: Sequence[Group], env: Environment) -> list[Group]:
    """Returns the same groups with a grade for each response."""
    return [
        Group(
            problem=group.problem,
            rollouts_G=group.rollouts_G,
            grades_G=[env.grade(group.problem, rollout.text) for rollout in group.rollouts_G],
        )
        for group in groups_P
    ]
