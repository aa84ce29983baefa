"""Problems, responses and grades put together; grades are made while other responses are still sampled."""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from sdpo_megatron.envs.base import Environment
from sdpo_megatron.records import Grade, Group, Problem, Rollout

Result = TypeVar("Result")
Prepared = TypeVar("Prepared")


class GradingThread:
    """An environment's thread: it does one thing at a time, in the order in which it is asked, whoever asks. An
    environment need not be made for several threads."""

    def __init__(self, env: Environment):
        self.env = env
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def run(self, work: Callable[[], Result]) -> "Future[Result]":
        """Returns the result to come. Safe from any thread, and returns at once."""
        future: Future[Result] = Future()
        self._tasks.put((future, work))
        if self._thread is None:
            # an executor's threads would be waited for at the end of the process
            self._thread = threading.Thread(target=self._work, name="grading", daemon=True)
            self._thread.start()
        return future

    def _work(self) -> None:
        while True:
            future, work = self._tasks.get()
            try:
                future.set_result(work())
            # whatever it is, it is raised where the result is waited for
            except BaseException as error:
                future.set_exception(error)
            # or the thread holds them until it gets the next
            del future, work


class Grading(Generic[Prepared]):
    """The grades of the responses to some problems, and what is made of each group once it is graded."""

    def __init__(
        self,
        problems: Sequence[Problem],
        thread: GradingThread,
        group_size: int,
        prepare: Callable[[int, Group], Prepared],
    ):
        """`prepare` is called in the thread, with the problem's index and its group, as soon as that has all grades."""
        self._problems = list(problems)
        self._thread = thread
        self._group_size = group_size
        self._prepare = prepare
        self._rollouts: dict[tuple[int, int], Rollout] = {}
        self._grades: dict[tuple[int, int], Future[Grade]] = {}
        self._prepared: dict[int, Future[Prepared]] = {}

    def begin(self, place: tuple[int, int], rollout: Rollout) -> None:
        """Has the response graded that is at `place`: the problem's index, and which of its responses."""
        p, problem, env = place[0], self._problems[place[0]], self._thread.env
        self._rollouts[place] = rollout
        self._grades[place] = self._thread.run(lambda: _grade(env, problem, rollout))
        if all((p, g) in self._grades for g in range(self._group_size)):
            # behind the grades in the thread's queue
            self._prepared[p] = self._thread.run(lambda: self._prepare(p, self._group(p)))

    def join(self) -> list[Group]:
        """Returns each problem with its responses and their grades. Waits for those that are not there yet, and raises
        what the environment raised."""
        return [self._group(p) for p in range(len(self._problems))]

    def prepared(self) -> list[Prepared]:
        """Returns what `prepare` has made of each group; waits, and raises what it raised."""
        return [self._prepared[p].result() for p in range(len(self._problems))]

    def _group(self, p: int) -> Group:
        places_G = [(p, g) for g in range(self._group_size)]
        return Group(
            problem=self._problems[p],
            rollouts_G=[self._rollouts[place] for place in places_G],
            grades_G=[self._grades[place].result() for place in places_G],
        )


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
