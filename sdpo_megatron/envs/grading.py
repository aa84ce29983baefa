"""Problems, responses and grades put together; grades are made while other responses are still sampled."""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from sdpo_megatron.envs.base import Environment
from sdpo_megatron.records import Grade, Group, Problem, Rollout


def join_groups(problems: Sequence[Problem], rollouts_PG: Sequence[list[Rollout]]) -> list[Group]:
    """Returns each problem with its responses, not yet graded."""
    return [
        Group(problem=problem, rollouts_G=rollouts_G)
        for problem, rollouts_G in zip(problems, rollouts_PG, strict=True)
    ]


class GradingThread:
    """An environment's thread: it grades one response at a time, in the order in which they come, whoever they are for.
    An environment need not be made for several threads."""

    def __init__(self, env: Environment):
        self._env = env
        self._tasks: queue.SimpleQueue[tuple[Future[Grade], Problem, Rollout]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def grade(self, problem: Problem, rollout: Rollout) -> "Future[Grade]":
        """Returns the grade to come. Safe from any thread, and returns at once."""
        future: Future[Grade] = Future()
        self._tasks.put((future, problem, rollout))
        if self._thread is None:
            # an executor's threads would be waited for at the end of the process
            self._thread = threading.Thread(target=self._work, name="grading", daemon=True)
            self._thread.start()
        return future

    def _work(self) -> None:
        while True:
            future, problem, rollout = self._tasks.get()
            try:
                future.set_result(_grade(self._env, problem, rollout))
            # whatever it is, it is raised where the grade is waited for
            except BaseException as error:
                future.set_exception(error)


class Grading:
    """The grades of the responses to some problems."""

    def __init__(self, problems: Sequence[Problem], grade: "Callable[[Problem, Rollout], Future[Grade]]"):
        """`grade` is a GradingThread's."""
        self._problems = list(problems)
        self._begin_grade = grade
        self._grades: dict[tuple[int, int], Future[Grade]] = {}

    def begin(self, place: tuple[int, int], rollout: Rollout) -> None:
        """Has the response graded that is at `place`: the problem's index, and which of its responses."""
        self._grades[place] = self._begin_grade(self._problems[place[0]], rollout)

    def join(self, groups_P: Sequence[Group]) -> list[Group]:
        """Returns the same groups with the grade of each response. Waits for those that are not there yet, and raises
        what the environment raised."""
        return [
            Group(
                problem=group.problem,
                rollouts_G=group.rollouts_G,
                grades_G=[self._grades[p, g].result() for g in range(len(group.rollouts_G))],
            )
            for p, group in enumerate(groups_P)
        ]


def _grade(env: Environment, problem: Problem, rollout: Rollout) -> Grade:
    """The environment judges answers; a response that ended inside its thought has none, and reward 0."""
    if rollout.finish_reason != "thinking":
        return env.grade(problem, rollout.text)
    tokens = len(rollout.response_ids_T)
    return Grade(
        reward=0.0,
        feedback=f"No answer came: the response ended after {tokens} tokens, inside its thought.",
        correct_format=False,
    )
