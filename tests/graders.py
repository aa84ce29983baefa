"""Graders for tests that need no processes."""

from collections.abc import Callable
from concurrent.futures import Future

from sdpo_megatron.envs.grading.thread import BackgroundThread
from sdpo_megatron.records import FinishReason, Grade, Problem, Rollout, Ungraded

Judge = Callable[[Problem, Rollout], Grade | Ungraded]


class AtOnce:
    """Grades where it is asked to."""

    def __init__(self, judge: Judge):
        self.judge = judge

    def submit(self, problem: Problem, rollout: Rollout) -> "Future[Grade | Ungraded]":
        grade: Future[Grade | Ungraded] = Future()
        grade.set_result(self.judge(problem, rollout))
        return grade


class InThread:
    """Grades one response after another, in a thread of its own."""

    def __init__(self, judge: Judge):
        self.judge = judge
        self.thread = BackgroundThread("a test's grader")

    def submit(self, problem: Problem, rollout: Rollout) -> "Future[Grade | Ungraded]":
        grade: Future[Grade | Ungraded] = Future()
        self.thread.run(lambda: self.judge(problem, rollout), grade)
        return grade


def answering(text: str, finish_reason: FinishReason = "stop") -> Rollout:
    """A response that nothing but its text, and why it ended, is known of."""
    return Rollout(
        prompt_ids=[],
        response_ids_T=[],
        rollout_logprobs_T=[],
        loss_mask_T=[],
        weight_spans=[],
        finish_reason=finish_reason,
        text=text,
    )
