"""Keeps one run's ranks and its server going on this machine, and ends them together."""

import os
import select
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from types import FrameType
from typing import Literal, Protocol

from sdpo_megatron.errors import EXIT_FAILED, EXIT_PEER_LOST, EXIT_USER_ERROR, RunFailed, UserError
from sdpo_megatron.launch.processes import Guard, RankProcess, rank_environment
from sdpo_megatron.launch.server import free_port
from sdpo_megatron.run_dir.directory import RunDirectory
from sdpo_megatron.run_dir.server_files import ServerFiles, ServerRecord
from sdpo_megatron.terminal import tell

STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT)
"""A rank that was asked to stop, by us or by somebody else, and saved."""
POLL_S = 0.2
STOP_GRACE_S = 120.0
"""What the ranks have to finish a phase and save, once they were asked to stop."""
ERROR_GRACE_S = 3.0
"""What the others have to end likewise, once a rank ended with an error message of its own."""
INSISTENCE_S = 1.0
"""Ctrl-C this much after the first means now; a single one may reach us twice, through make or timeout."""

RESUMES = "The same command goes on from the newest checkpoint."
SAID_BY_RANK = ("error: ", "stopped: ")
"""How a rank begins the line in which it says why it ends."""


class Server(Protocol):
    """What is supervised: rollout.server.ServerProcess."""

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
    """Of each rank; RANK and the like tell them apart."""
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
        """To be called often. Raises RunFailed if it does not come up.

        How often it may be lost once it is up is for rank 0 to decide, which knows what it did in between."""
        if self._files.take_request(0) == self._starts:
            self._restart("hangs")
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
    """`run` once. Must be used in the main thread, with whose end all children end."""

    def __init__(
        self,
        directory: RunDirectory,
        ranks: Ranks,
        server: Server | None,
        *,
        max_restarts: int,
        stop_grace_s: float = STOP_GRACE_S,
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
        self._running: list[RankProcess] = []
        self._stop_deadline: float | None = None
        self._exit_code = 0

    def run(self) -> int:
        """0: all ranks finished; 128 + signal: asked to stop; 2: the user's to mend; 1: a rank died.

        Raises RunFailed if the server does not come up. Afterwards no child is left."""
        with self._signals.caught():
            try:
                self._start()
                self._watch()
            finally:
                self._kill_ranks()
                if self._keeper:
                    self._keeper.stop()
                self._guard.close()
        if self._exit_code in (0, *STOPPED) and self._signals.first is not None:
            return 128 + self._signals.first
        return self._exit_code

    def _start(self) -> None:
        if self._keeper:
            self._keeper.start()
        port = free_port("127.0.0.1")
        for rank in range(self._plan.count):
            environment = rank_environment(
                self._plan.environment, rank, self._plan.count, port, self._plan.device
            )
            log = self._directory.logs / f"rank{rank}.log"
            self._running.append(RankProcess(rank, self._plan.command, environment, log, self._guard))

    def _watch(self) -> None:
        while self._running:
            wait([rank.descriptor for rank in self._running], timeout=POLL_S)
            ended = [rank for rank in self._running if rank.ended()]
            if ended:
                self._leave(ended)
            if self._running and not self._stop():
                return
            if self._running and self._keeper:
                self._keeper.tend()

    def _stop(self) -> bool:
        """Passes a wish to stop on; False once there is nothing more to wait for."""
        signals = self._signals
        if signals.first is None:
            return True
        if self._stop_deadline is None:
            self._stop_deadline = time.monotonic() + self._stop_grace_s
            for rank in self._running:
                rank.ask_to_stop()
            say("Stopping: the ranks save and leave. Ctrl-C again ends them at once.")
        if signals.insists:
            say("Ended at once, without saving.")
            return False
        if time.monotonic() > self._stop_deadline:
            say(f"The ranks did not leave within {self._stop_grace_s:g} seconds; ended without saving.")
            return False
        return True

    def _leave(self, ended: Sequence[RankProcess]) -> None:
        """Takes leave of ranks that ended; of all others too if one of these died."""
        codes = {rank: self._reap(rank) for rank in ended}
        died = {rank: code for rank, code in codes.items() if code not in (0, *STOPPED)}
        if self._signals.first is not None:  # before its handler is in place, SIGTERM ends a rank at once
            died = {rank: code for rank, code in died.items() if code != -signal.SIGTERM}
            if -signal.SIGTERM in codes.values():
                died = {rank: code for rank, code in died.items() if code != EXIT_PEER_LOST}
                self._kill_ranks()  # the others cannot go on without it, and there is nothing yet to save
        if not died:
            self._exit_code = max(self._exit_code, *codes.values())
            return
        if set(died.values()) == {EXIT_PEER_LOST}:  # the one that was lost is about to be seen
            self._wait_for_all(ERROR_GRACE_S)
            others = {rank: self._reap(rank) for rank in list(self._running) if rank.ended()}
            died |= {rank: code for rank, code in others.items() if code not in (0, *STOPPED)}
        # The death by a signal is the cause where others ended at the same time because of it.
        culprit = min(died, key=lambda rank: (died[rank] > 0, died[rank] == EXIT_PEER_LOST, rank.rank))
        code = died[culprit]
        if said_why(culprit, code):
            self._wait_for_all(ERROR_GRACE_S)
            for rank in [rank for rank in self._running if rank.rank == 0 and rank.ended()]:
                culprit, code = self._better_witness(culprit, code, rank)
        self._kill_ranks()
        self._exit_code = EXIT_USER_ERROR if code == EXIT_USER_ERROR else EXIT_FAILED
        report(culprit, code)

    def _better_witness(self, culprit: RankProcess, code: int, zero: RankProcess) -> tuple[RankProcess, int]:
        """Rank 0, whose message is on the terminal already, if it had one to give."""
        zero_code = self._reap(zero)
        knows = said_why(zero, zero_code) and zero_code != EXIT_PEER_LOST
        return (zero, zero_code) if knows else (culprit, code)

    def _wait_for_all(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not all(rank.ended() for rank in self._running) and time.monotonic() < deadline:
            time.sleep(POLL_S / 4)

    def _reap(self, rank: RankProcess) -> int:
        self._running.remove(rank)
        return rank.reap()

    def _kill_ranks(self) -> None:
        for rank in self._running:
            rank.kill()
        for rank in list(self._running):
            self._reap(rank)


def said_why(rank: RankProcess, code: int) -> bool:
    """Whether the rank ended with a message of its own, after its own choice."""
    lines = rank.log_end()
    return (
        code in (EXIT_FAILED, EXIT_USER_ERROR, EXIT_PEER_LOST)
        and bool(lines)
        and lines[-1].startswith(SAID_BY_RANK)
    )


def report(rank: RankProcess, code: int) -> None:
    """One line about a rank that died, and the end of its log unless that is on the terminal already."""
    if said_why(rank, code):
        if rank.rank != 0:
            say(rank.log_end()[-1])
        return
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    say(f"error: rank {rank.rank} {how} (log: {rank.log_path}). {RESUMES}")
    if rank.rank != 0:
        say("\n".join(rank.log_end()))


def say(text: str) -> None:
    """To the person at the terminal; the cursor, which a live display hides, is shown again."""
    is_read = select.select([], [sys.stderr], [], POLL_S)[1]  # who stopped reading holds nobody up
    if not text or not is_read:
        return
    show_cursor = "\x1b[?25h" if os.isatty(sys.stderr.fileno()) else ""
    tell(f"{show_cursor}{text}", sys.stderr)
