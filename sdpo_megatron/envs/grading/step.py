"""Problems, responses and grades put together; grades are made while other responses are still sampled."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, Protocol, TypeVar

from sdpo_megatron.records import Grade, Group, Problem, Rollout, Ungraded

Prepared = TypeVar("Prepared")


class Grader(Protocol):
    """What grades beside the rollouts: GradingPool."""

    def submit(self, problem: Problem, rollout: Rollout) -> "Future[Grade | Ungraded]": ...


class Grading(Generic[Prepared]):
    """The grades of the responses to some problems, and what is made of each group once it is graded."""

    def __init__(
        self,
        problems: Sequence[Problem],
        grader: Grader,
        group_size: int,
        prepare: "Callable[[int, Group, Future[Prepared]], None] | None" = None,
    ):
        """`prepare` is called with the problem's index and its group as soon as that has all grades, in a thread that
        should not be kept: it hands on the work whose result the future is to get."""
        self._problems = list(problems)
        self._grader = grader
        self._group_size = group_size
        self._prepare = prepare
        self._rollouts: dict[tuple[int, int], Rollout] = {}
        self._grades: dict[tuple[int, int], Future[Grade | Ungraded]] = {}
        self._prepared: list[Future[Prepared]] = [Future() for _ in self._problems]
        self._missing_P = [group_size] * len(self._problems)
        self._lock = threading.Lock()

    def begin(self, place: tuple[int, int], rollout: Rollout) -> None:
        """Has the response graded that is at `place`: the problem's index, and which of its responses."""
        p, problem = place[0], self._problems[place[0]]
        self._rollouts[place] = rollout
        grade = _without_answer(rollout) or self._grader.submit(problem, rollout)
        self._grades[place] = grade
        grade.add_done_callback(lambda _: self._is_graded(p))

    def join(self) -> list[Group]:
        """Returns each problem with its responses and their grades. Waits for those that are not there yet."""
        return [self._group(p) for p in range(len(self._problems))]

    def prepared(self) -> list[Prepared]:
        """Returns what `prepare` has made of each group; waits, and raises what it raised."""
        return [future.result() for future in self._prepared]

    def _is_graded(self, p: int) -> None:
        with self._lock:
            self._missing_P[p] -= 1
            complete = self._missing_P[p] == 0
        if complete and self._prepare is not None:
            try:
                self._prepare(p, self._group(p), self._prepared[p])
            # a bug of ours: raised where it is waited for, and not lost in a thread
            except BaseException as error:
                self._prepared[p].set_exception(error)

    def _group(self, p: int) -> Group:
        places_G = [(p, g) for g in range(self._group_size)]
        grades_G = [self._grades[place].result() for place in places_G]
        graded = [(g, grade) for g, grade in enumerate(grades_G) if isinstance(grade, Grade)]
        return Group(
            problem=self._problems[p],
            rollouts_G=[self._rollouts[p, g] for g, _ in graded],
            grades_G=[grade for _, grade in graded],
            ungraded={g: grade for g, grade in enumerate(grades_G) if isinstance(grade, Ungraded)},
        )


def _without_answer(rollout: Rollout) -> "Future[Grade | Ungraded] | None":
    """The environment judges answers; a response that ended inside its thought has none, and reward 0."""
    if rollout.finish_reason != "thinking":
        return None
    tokens = len(rollout.response_ids_T)
    grade: Future[Grade | Ungraded] = Future()
    grade.set_result(
        Grade(
            reward=0.0,
            feedback=f"No answer came: the response ended after {tokens} tokens, inside its thought.",
            correct_format=False,
        )
    )
    return grade
