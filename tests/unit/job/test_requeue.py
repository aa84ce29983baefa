"""Whether a job comes back, from how its attempts ended."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from sdpo_megatron.job.requeue import FIRST_PAUSE_S, Attempt, decide

PREEMPTED = Attempt(why="preempted", steps=5)


def failed(steps: int = 5, reason: str = "rank 1 was ended by SIGKILL", exit_code: int = 1) -> Attempt:
    return Attempt(why="failed", steps=steps, exit_code=exit_code, reason=reason)


@pytest.mark.parametrize(
    ("attempts", "requeue", "told"),
    [
        ([Attempt(why="finished", steps=9)], False, "finished: 9 steps."),
        ([Attempt(why="asked", steps=4)], False, "stopped after 4 steps, which are saved"),
        ([PREEMPTED], True, "it comes back"),
        ([PREEMPTED] * 100, True, "it comes back"),
        ([failed()], True, "failed after 5 steps (rank 1 was ended by SIGKILL); it comes back."),
        ([failed(exit_code=2, reason="no such model")], False, "failed, and would again: no such model"),
        ([failed(), failed()], True, "it comes back"),
        ([failed(), failed(), failed()], False, "failed 3 times in a row after 5 steps: rank 1 was"),
        # it came further, or failed otherwise, or was preempted in between
        ([failed(), failed(), failed(steps=6)], True, "it comes back"),
        ([failed(), failed(), failed(reason="another")], True, "it comes back"),
        ([failed(), failed(), PREEMPTED, failed()], True, "it comes back"),
        ([failed(steps=k) for k in range(21)], False, "failed 21 times, and hardware.max_requeues is 20"),
        ([failed(steps=k) for k in range(20)], True, "it comes back"),
        # somebody submitted it again
        ([failed(), failed(), replace(failed(), job=8)], True, "it comes back"),
    ],
)
def test_what_follows(attempts: Sequence[Attempt], requeue: bool, told: str):
    verdict = decide(attempts, 20)
    assert verdict.requeue == requeue and told in verdict.line


def test_what_fails_again_without_having_come_further_is_waited_for_longer():
    assert decide([failed()], 20).pause_s == FIRST_PAUSE_S
    assert decide([failed(), failed()], 20).pause_s == 2 * FIRST_PAUSE_S
    assert decide([failed(), failed(steps=6)], 20).pause_s == FIRST_PAUSE_S
    assert decide([PREEMPTED], 20).pause_s == 0
