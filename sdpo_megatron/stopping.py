"""SIGTERM, SIGINT and SIGHUP as a wish that the loop grants at the next good moment, or that is passed on."""

import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType


def stop_signals() -> tuple[signal.Signals, ...]:
    """Returns the signals that ask to stop: SIGHUP, of a terminal or connection that is gone, is one unless this
    process was started to outlive that (nohup)."""
    asking = (signal.SIGTERM, signal.SIGINT)
    return asking if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (*asking, signal.SIGHUP)


class StopRequest:
    """Whether this process was asked to stop; `interrupting` names what a signal should cut short meanwhile."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._interrupt: Callable[[], None] | None = None

    @property
    def requested(self) -> bool:
        return self.signal is not None

    @contextmanager
    def interrupting(self, interrupt: Callable[[], None]) -> Iterator[None]:
        """Within this context a signal also calls `interrupt`, which must be safe in a signal handler."""
        self._interrupt = interrupt
        try:
            # the signal came just before
            if self.requested:
                interrupt()
            yield
        finally:
            self._interrupt = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        if self._interrupt is not None:
            self._interrupt()


def install_stop_signals() -> StopRequest:
    """Has these signals tell the request that is returned. Must be called from the main thread."""
    stop = StopRequest()
    for number in stop_signals():
        signal.signal(number, stop.handle)
    return stop


class Stopped(Exception):
    """The run was asked to stop while it waited for rollouts or for a server."""


def run_until_stopped(command: Sequence[str]) -> int:
    """Runs `command` and returns its exit code. Signals that ask to stop are passed on to it: it may have to save
    before it ends.

    Must be called from the main thread."""
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        if child is None:
            early.append(number)
        else:
            child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in stop_signals()}
    try:
        child = subprocess.Popen(command)
        for number in early:
            child.send_signal(number)
        return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
