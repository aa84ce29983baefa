"""Keeps one run's ranks and its server going on this machine, and ends them together."""

import os
import select
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType
from typing import Literal

from sdpo_megatron.launch.hangs import HangWatch, Watched
from sdpo_megatron.launch.processes import ChildProcess, Guard, kept_temporary_files, rank_environment
from sdpo_megatron.launch.server import ServerProcess
from sdpo_megatron.launch.server_keeper import ServerKeeper
from sdpo_megatron.launch.verdict import RESUMES, Ending, for_the_others, judge
from sdpo_megatron.run_dir.directory import RunDirectory
from sdpo_megatron.run_dir.phases import read_ending
from sdpo_megatron.run_dir.server_files import ServerFiles
from sdpo_megatron.stopping import stop_signals
from sdpo_megatron.terminal import tell

POLL_S = 0.2
ERROR_GRACE_S = 3.0
"""The time in which the other ranks have to end, once a rank has failed and stated why."""
INSISTENCE_S = 1.0
"""A second Ctrl-C later than this means to end now; a single one may reach us twice, through make or timeout."""


class StopSignals:
    """Signals that ask the launcher to stop: the first asks, another SIGINT a moment later insists."""

    def __init__(self) -> None:
        self.first: int | None = None
        self.insists = False
        self._since = 0.0

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.first is None:
            self.first, self._since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > INSISTENCE_S:
            self.insists = True

    @contextmanager
    def caught(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle) for number in stop_signals()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@dataclass(kw_only=True, eq=False)
class Supervisor:
    """Supervises one run: `run` is called once. Must be used in the main thread, with whose end all children end."""

    directory: RunDirectory
    """Must be made and locked."""
    command: Sequence[str]
    """The command of each rank; RANK and the like tell them apart."""
    count: int
    """How many ranks there are."""
    device: Literal["cpu", "cuda"]
    server: ServerProcess | None
    """None where somebody else runs the servers."""
    on_loopback: bool
    """Whether all servers are on this machine."""
    max_restarts: int
    stop_grace_s: float
    hang_timeout_s: float

    def __post_init__(self) -> None:
        self._signals = StopSignals()
        self._guard = Guard()
        self.directory.forget_earlier_start()
        files = ServerFiles(self.directory.servers)
        self._keeper = None
        if self.server is not None:
            self._keeper = ServerKeeper(
                *(self.server, files, self._guard, self.max_restarts),
                stopping=lambda: self._asked is not None,
                say=say,
            )
        self._hangs = HangWatch(self.directory, self.hang_timeout_s)
        self._running: dict[int, ChildProcess] = {}
        """The processes that run, by rank."""
        self._endings: list[Ending] = []
        self._stop_deadline: float | None = None
        self._gave_up = False
        """Whether ranks hang for too long."""

    def run(self) -> int:
        """Runs the ranks and returns the command's exit code. 0: all ranks finished; 128 + signal: asked to stop; 2:
        the user's to mend; 1: a rank failed.

        Raises RunFailed if the server does not come up. Afterwards no child is left."""
        with ExitStack() as at_the_end:
            at_the_end.enter_context(self._signals.caught())
            at_the_end.callback(self._guard.close)
            if self._keeper:
                at_the_end.callback(self._keeper.end)
            at_the_end.callback(self._kill_ranks)
            self._start()
            self._watch()
            self._kill_ranks()
            exit_code, messages = judge(self._endings, self._signals.first, hung=self._gave_up)
            for message in messages:
                say(message)
            return exit_code

    def _start(self) -> None:
        if self._keeper:
            self._keeper.start()
        for rank in range(self.count):
            environment = rank_environment(rank, self.count, self.device, on_loopback=self.on_loopback)
            log = self.directory.logs / f"rank{rank}.log"
            temporary = Path(tempfile.mkdtemp(prefix=f"sdpo_rank{rank}_"))
            # sandboxes let programs of other users in, who cannot list it
            temporary.chmod(0o711)
            environment |= kept_temporary_files(temporary)
            self._running[rank] = ChildProcess(
                *(self.command, environment, log),
                on_terminal=rank == 0,
                guard=self._guard,
                directory=temporary,
            )

    def _watch(self) -> None:
        """Returns once no rank runs, or those that do are to be killed."""
        grace_deadline: float | None = None
        while self._running:
            wait([child.descriptor for child in self._running.values()], timeout=POLL_S)
            self._see_who_ended()
            others = for_the_others(self._endings, self._asked)
            if others == "kill":
                return
            if others == "grace":
                grace_deadline = grace_deadline or time.monotonic() + ERROR_GRACE_S
                if time.monotonic() > grace_deadline:
                    return
            elif self._running and self._asked is not None:
                if not self._stop(self._asked):
                    return
            elif self._running:
                if self._keeper:
                    self._keeper.tend()
                self._look_for_hangs()

    @property
    def _asked(self) -> int | None:
        """The signal by which the ranks are asked to stop: one that reached us, or our own where they hang."""
        return signal.SIGTERM if self._gave_up and self._signals.first is None else self._signals.first

    def _look_for_hangs(self) -> None:
        found = self._hangs.look(
            {rank: Watched(f"process {child.pid}", child.pid) for rank, child in self._running.items()}
        )
        if found is not None:
            say(found)
        self._gave_up = self._hangs.is_overdue

    def _stop(self, asked: int) -> bool:
        """Passes a wish to stop on; False once there is nothing more to wait for."""
        signals = self._signals
        if self._stop_deadline is None:
            self._stop_deadline = time.monotonic() + self.stop_grace_s
            for child in self._running.values():
                child.ask_to_stop()
            why = self._hangs.overdue_in_words if self._gave_up else signal.Signals(asked).name
            say(
                f"Stopping ({why}): the ranks save and leave. Ctrl-C again, after a second, ends them at once."
            )
        if signals.insists:
            say(f"Ended at once, without saving. {RESUMES}")
            return False
        if time.monotonic() > self._stop_deadline:
            limit = f"run.stop_grace_s={self.stop_grace_s:g} seconds"
            say(f"The ranks did not leave within {limit}; ended without saving. {RESUMES}")
            return False
        return True

    def _see_who_ended(self) -> None:
        now = time.monotonic()
        for rank in [rank for rank, child in self._running.items() if child.ended()]:
            child = self._running.pop(rank)
            code = child.end()
            stated = read_ending(self.directory.ending(rank))
            # who states a reason and is killed before it exits has not ended for that reason
            reason = stated["message"] if stated is not None and stated["exit_code"] == code else None
            self._endings.append(
                Ending(
                    rank=rank,
                    exit_code=code,
                    seen_at=now,
                    stated=reason,
                    log=str(child.log_path),
                    log_end=child.log_end(),
                )
            )

    def _kill_ranks(self) -> None:
        for child in self._running.values():
            child.kill()
        while self._running:
            self._running.popitem()[1].end()


def say(text: str) -> None:
    """Tells the person at the terminal; the cursor, which a live display hides, is shown again."""
    # who stopped reading holds nobody up
    is_read = select.select([], [sys.stderr], [], POLL_S)[1]
    if not text or not is_read:
        return
    show_cursor = "\x1b[?25h" if os.isatty(sys.stderr.fileno()) else ""
    tell(f"{show_cursor}{text}", sys.stderr)
