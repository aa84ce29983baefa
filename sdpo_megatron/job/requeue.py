"""What becomes of a job once an attempt has ended: a pure decision, from how it ended and from the attempts before."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sdpo_megatron.errors import EXIT_USER_ERROR

SAME_ERRORS = 3
"""The same error at the same step so many times in a row is no bad luck."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 10.0, 900.0
Why = Literal["finished", "asked", "preempted", "failed"]


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """How one attempt ended."""

    why: Why
    """`asked`: by the user. `preempted`: told by Slurm that its time is over, or its nodes are another's."""
    steps: int
    """Training steps behind the run at its end."""
    exit_code: int = 0
    """Of the part that failed."""
    reason: str = ""
    """In one line, without what differs from attempt to attempt."""
    job: int = 0
    """Slurm's number: who submits a run again begins to count anew."""


@dataclass(frozen=True)
class Decision:
    requeue: bool
    line: str
    """What is told to whoever asks for the state of the job."""
    pause_s: float = 0.0
    """How long to wait before the next attempt."""


def decide(attempts: Sequence[Attempt], max_requeues: int) -> Decision:
    """Returns what follows `attempts`, the last of which has just ended. Preemptions do not count as failures."""
    last = attempts[-1]
    attempts = [attempt for attempt in attempts if attempt.job == last.job]
    if last.why == "finished":
        return Decision(False, f"finished: {last.steps} steps.")
    if last.why == "asked":
        return Decision(
            False, f"stopped after {last.steps} steps, which are saved; submit it again to go on."
        )
    if last.why == "preempted":
        return Decision(True, f"preempted, or out of time, after {last.steps} steps; it comes back.")
    if last.exit_code == EXIT_USER_ERROR:
        return Decision(False, f"failed, and would again: {last.reason}")
    alike = 0
    for attempt in reversed(attempts):
        if (attempt.why, attempt.steps, attempt.reason) != ("failed", last.steps, last.reason):
            break
        alike += 1
    if alike >= SAME_ERRORS:
        return Decision(False, f"failed {alike} times in a row after {last.steps} steps: {last.reason}")
    failures = sum(attempt.why == "failed" for attempt in attempts)
    if failures > max_requeues:
        return Decision(
            False, f"failed {failures} times, and hardware.max_requeues is {max_requeues}: {last.reason}"
        )
    # what fails without having come further is waited for longer
    pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (alike - 1))
    return Decision(True, f"failed after {last.steps} steps ({last.reason}); it comes back.", pause_s)
