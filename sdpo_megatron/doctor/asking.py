"""Another program is asked something, within a limit, and never left behind."""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from sdpo_megatron.envs.grading.host import end_with_parent

LEFT_OVER_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Answer:
    exit_code: int | None
    """None where the program did not end in time, minus the signal where one ended it."""
    output: str
    errors: str

    @property
    def last_error(self) -> str:
        """The last line that the program wrote to its standard error."""
        lines = [line.strip() for line in self.errors.splitlines() if line.strip()]
        return lines[-1] if lines else ""


def started(command: Sequence[str], environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Starts a program in a session of its own, which dies with this process. Raises OSError where it cannot be
    started."""
    us = os.getpid()
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,
        # a check has one thread
        preexec_fn=lambda: end_with_parent(us, signal.SIGKILL),
    )


def answer_of(program: subprocess.Popen[str], limit_s: float) -> Answer:
    """Returns what a program that was `started` says; it is gone then."""
    try:
        output, errors = program.communicate(timeout=limit_s)
        return Answer(exit_code=program.returncode, output=output, errors=errors)
    except subprocess.TimeoutExpired:
        end(program)
        output, errors = program.communicate(timeout=LEFT_OVER_S)
        return Answer(exit_code=None, output=output, errors=errors)
    finally:
        end(program)


def end(program: subprocess.Popen[str]) -> None:
    """Ends a program and its children; once it was waited for, its process id may be another's."""
    if program.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)


def ask(command: Sequence[str], limit_s: float, environment: Mapping[str, str] | None = None) -> Answer:
    """Starts a program and returns what it says. Raises OSError where it cannot be started."""
    return answer_of(started(command, environment), limit_s)
