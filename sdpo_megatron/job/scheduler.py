"""What an attempt asks of whatever runs the job."""

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from sdpo_megatron.cluster.steps import Step


class RunningStep(Protocol):
    """A step of the job, which was started."""

    def exit_code(self) -> int | None:
        """Returns the largest exit code of its tasks, None while any runs."""
        ...

    def send(self, number: signal.Signals) -> bool:
        """Signals all of its tasks. Returns whether that was done: not before they run, nor while nobody answers."""
        ...

    def end(self) -> None:
        """Ends it at once, and waits for that."""
        ...


class Scheduler(Protocol):
    """Slurm, or this machine."""

    @property
    def job(self) -> int:
        """The job's number."""
        ...

    @property
    def hosts(self) -> Sequence[str]:
        """The names of its nodes; this process runs on the first."""
        ...

    def start(self, step: Step, log: Path) -> RunningStep:
        """Starts a step. What is said of it, but not by it, goes to the end of `log`."""
        ...

    def end_steps(self) -> None:
        """Ends what an attempt has left running whose process was killed."""
        ...

    def time_left_s(self) -> float:
        """Returns how long the job may still run, infinity where that is not known."""
        ...

    def preemption_grace_s(self) -> float | None:
        """Returns how long a job whose nodes are taken away may still run, None where they are not, or that is not
        known."""
        ...

    def is_cancelled(self) -> bool:
        """Returns whether somebody has cancelled the job, as far as that is known; one may do so while it already ends
        for another reason."""
        ...

    def come_back(self) -> int:
        """Has the job come back once this process has ended; returns the exit code that it must end with."""
        ...
