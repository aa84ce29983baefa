"""Keeps one run's ranks and its server going on this machine, and ends them together."""

import os
import select
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from types import FrameType
from typing import Literal, Protocol

from sdpo_megatron.errors import RunFailed, UserError
from sdpo_megatron.launch.processes import ChildProcess, Guard, rank_environment
from sdpo_megatron.launch.server import free_port
from sdpo_megatron.launch.verdict import Ending, for_the_others, judge
from sdpo_megatron.run_dir.directory import RunDirectory
from sdpo_megatron.run_dir.endings import clear_endings, read_ending
from sdpo_megatron.run_dir.server_files import ServerFiles, ServerRecord
from sdpo_megatron.terminal import tell

POLL_S = 0.2
ERROR_GRACE_S = 3.0
"""The time in which the other ranks have to end, once a rank has failed and stated why."""
INSISTENCE_S = 1.0
"""A second Ctrl-C later than this means to end now; a single one may reach us twice, through make or timeout."""


class Server(Protocol):
    """What is supervised: server.ServerProcess."""

    @property
    def url(self) -> str: ...

    @property
    def pid(self) -> int | None: ...

    def start(self) -> None: ...

    def came_up(self) -> bool: ...

    def alive(self) -> bool: ...

    def stop(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Ranks:
    command: Sequence[str]
    """The command of each rank; RANK and the like tell them apart."""
    count: int
    device: Literal["cpu", "cuda"]
    environment: Mapping[str, str]


class StopSignals:
    """SIGTERM and SIGINT to the launcher: the first asks, another SIGINT a moment later insists."""

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
        before = {number: signal.signal(number, self.handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class ServerKeeper:
    """Starts the server, and starts it again when it ended or rank 0 asks for that."""

    def __init__(self, server: Server, files: ServerFiles, guard: Guard, max_restarts: int) -> None:
        self._server, self._files, self._guard = server, files, guard
        self._max_restarts = max_restarts
        self._starts = 0
        self._failed_starts = 0
        self._group: int | None = None
        self._starting = False

    def start(self) -> None:
        self._server.start()
        self._starts += 1
        self._starting = True
        assert self._server.pid is not None
        self._group = self._server.pid
        self._guard.watch(self._group)
        self._files.write(0, ServerRecord(url=self._server.url, pid=self._group, starts=self._starts))

    def tend(self) -> None:
        """Starts the server again where that is needed. Must be called often. Raises RunFailed if it does not come up.

        How often it may be lost once it is up is for rank 0 to decide, which knows what it did in between."""
        if self._files.take_request(0) == self._starts:
            self._restart("hangs" if self._server.alive() else "ended")
        elif self._starting:
            self._check_start()
        elif not self._server.alive():
            self._restart("ended")

    def stop(self) -> None:
        self._server.stop()
        if self._group is not None:
            self._guard.release(self._group)
            self._group = None

    def _check_start(self) -> None:
        try:
            self._starting = not self._server.came_up()
        except UserError as error:
            self._failed_starts += 1
            if self._starts == 1 or self._failed_starts > self._max_restarts:
                raise RunFailed(error.message, error.log_end) from None
            self._restart("did not come up again")
            return
        if not self._starting:
            self._failed_starts = 0

    def _restart(self, what: str) -> None:
        say(f"The server at {self._server.url} {what}; starting it again.")
        self.stop()
        self.start()


class Supervisor:
    """Supervises one run: `run` is called once. Must be used in the main thread, with whose end all children end."""

    def __init__(
        self,
        directory: RunDirectory,
        ranks: Ranks,
        server: Server | None,
        *,
        max_restarts: int,
        stop_grace_s: float,
    ) -> None:
        """`server` is None where somebody else runs the servers. `directory` must be made and locked."""
        self._directory = directory
        self._plan = ranks
        self._stop_grace_s = stop_grace_s
        self._signals = StopSignals()
        self._guard = Guard()
        files = ServerFiles(directory.servers)
        files.clear()
        self._keeper = ServerKeeper(server, files, self._guard, max_restarts) if server else None
        clear_endings(directory.endings)
        self._running: dict[int, ChildProcess] = {}
        """The processes that run, by rank."""
        self._endings: list[Ending] = []
        self._stop_deadline: float | None = None

    def run(self) -> int:
        """Runs the ranks and returns the command's exit code. 0: all ranks finished; 128 + signal: asked to stop; 2:
        the user's to mend; 1: a rank failed.

        Raises RunFailed if the server does not come up. Afterwards no child is left."""
        with ExitStack() as at_the_end:
            at_the_end.enter_context(self._signals.caught())
            at_the_end.callback(self._guard.close)
            if self._keeper:
                at_the_end.callback(self._keeper.stop)
            at_the_end.callback(self._kill_ranks)
            self._start()
            self._watch()
            self._kill_ranks()
            verdict = judge(self._endings, self._signals.first)
            for message in verdict.messages:
                say(message)
            return verdict.exit_code

    def _start(self) -> None:
        if self._keeper:
            self._keeper.start()
        port = free_port("127.0.0.1")
        plan = self._plan
        for rank in range(plan.count):
            environment = rank_environment(plan.environment, rank, plan.count, port, plan.device)
            log = self._directory.logs / f"rank{rank}.log"
            child = ChildProcess(plan.command, environment, log, on_terminal=rank == 0)
            self._guard.watch(child.pid)
            self._running[rank] = child

    def _watch(self) -> None:
        """Returns once no rank runs, or those that do are to be killed."""
        grace_deadline: float | None = None
        while self._running:
            wait([child.descriptor for child in self._running.values()], timeout=POLL_S)
            self._see_who_ended()
            others = for_the_others(self._endings, self._signals.first)
            if others == "kill":
                return
            if others == "grace":
                grace_deadline = grace_deadline or time.monotonic() + ERROR_GRACE_S
                if time.monotonic() > grace_deadline:
                    return
            elif self._running and not self._stop():
                return
            elif self._running and self._keeper:
                self._keeper.tend()

    def _stop(self) -> bool:
        """Passes a wish to stop on; False once there is nothing more to wait for."""
        signals = self._signals
        if signals.first is None:
            return True
        if self._stop_deadline is None:
            self._stop_deadline = time.monotonic() + self._stop_grace_s
            for child in self._running.values():
                child.ask_to_stop()
            say("Stopping: the ranks save and leave. Ctrl-C again ends them at once.")
        if signals.insists:
            say("Ended at once, without saving.")
            return False
        if time.monotonic() > self._stop_deadline:
            say(
                f"The ranks did not leave within run.stop_grace_s={self._stop_grace_s:g} seconds; ended without saving."
            )
            return False
        return True

    def _see_who_ended(self) -> None:
        now = time.monotonic()
        for rank in [rank for rank, child in self._running.items() if child.ended()]:
            child = self._running[rank]
            code = self._end(rank)
            stated = read_ending(self._directory.ending(rank))
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

    def _end(self, rank: int) -> int:
        child = self._running.pop(rank)
        code = child.end()
        self._guard.release(child.pid)
        return code

    def _kill_ranks(self) -> None:
        for child in self._running.values():
            child.kill()
        for rank in list(self._running):
            self._end(rank)


def say(text: str) -> None:
    """Tells the person at the terminal; the cursor, which a live display hides, is shown again."""
    # who stopped reading holds nobody up
    is_read = select.select([], [sys.stderr], [], POLL_S)[1]
    if not text or not is_read:
        return
    show_cursor = "\x1b[?25h" if os.isatty(sys.stderr.fileno()) else ""
    tell(f"{show_cursor}{text}", sys.stderr)
