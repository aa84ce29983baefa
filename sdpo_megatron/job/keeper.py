"""What a job runs: python -m sdpo_megatron.job.keeper [--local] RUN_DIRECTORY. It has a process of its own make each
attempt, and the job come back where that process is killed, as where memory runs out. It does little, so that little
can happen to it."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

DIE_WITH_PARENT = Path(__file__).parents[1] / "launch" / "die_with_parent.py"
PR_SET_PDEATHSIG = 1
PYTHON = sys.executable
HANDED_ON = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def in_job(run: str) -> None:
    """Makes one attempt in a job of Slurm. Exits where the exit code is not 0."""
    leave(keep([run]))


def in_local_job(run: str) -> None:
    """The same in a job on this machine."""
    # where submitit's own process ends, nobody would have it come back
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    leave(keep(["--local", run]))


def leave(code: int) -> None:
    if code:
        sys.exit(code)


def keep(arguments: Sequence[str]) -> int:
    """Runs sdpo_megatron.job.run with `arguments`, and hands signals on; returns the exit code for the scheduler."""
    handed_on: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def hand_on(number: int, frame: FrameType | None) -> None:
        handed_on.append(number)
        if child is not None:
            child.send_signal(number)

    for number in HANDED_ON:
        signal.signal(number, hand_on)
    # what it starts ends with it
    dies_with_us = [sys.executable, "-I", "-S", str(DIE_WITH_PARENT), str(os.getpid())]
    child = subprocess.Popen([*dies_with_us, PYTHON, "-m", "sdpo_megatron.job.run", *arguments])
    # who came before there was a child
    for number in list(handed_on):
        child.send_signal(number)
    code = child.wait()
    # what was to stop it may have ended it before it had an ear for that
    if code >= 0 or -code in handed_on:
        return code if code >= 0 else 128 - code
    from sdpo_megatron.job.run import after_loss

    return after_loss(arguments, f"the job's own process was ended by {signal.Signals(-code).name}")


if __name__ == "__main__":
    leave(keep(sys.argv[1:]))
