"""Ranks as child processes: started, logged, ended, and never left behind."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from sdpo_megatron.launch.server import DIE_WITH_PARENT

KILL_ORPHANS = Path(__file__).with_name("kill_orphans.py")
LOG_LINES_SHOWN = 20
COPY_GRACE_S = 2.0


class Guard:
    """A process that kills the process groups it was told of, should this one end without releasing them."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(KILL_ORPHANS)], stdin=subprocess.PIPE, start_new_session=True
        )

    def watch(self, group: int) -> None:
        self._tell(f"+{group}\n")

    def release(self, group: int) -> None:
        """The group is gone; its number may soon be another's."""
        self._tell(f"-{group}\n")

    def close(self) -> None:
        """Kills the groups that were not released."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        # Unbuffered, or an unexpected end would find it untold. Somebody may have killed the guard; then each
        # child still has its death signal.
        with contextlib.suppress(BrokenPipeError):
            os.write(self._process.stdin.fileno(), line.encode())


class RankProcess:
    """One rank, in a session and process group of its own: Ctrl-C in the terminal does not reach it.

    It dies with the thread that made it (see die_with_parent.py), its children by the guard."""

    def __init__(
        self,
        rank: int,
        command: Sequence[str],
        environment: Mapping[str, str],
        log_path: Path,
        guard: Guard,
    ) -> None:
        """Rank 0 writes to our terminal, its standard error to its log as well; the others to their logs."""
        self.rank = rank
        self.log_path = log_path
        self._guard = guard
        self._copier: threading.Thread | None = None
        with log_path.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(DIE_WITH_PARENT), str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=None if rank == 0 else log,
                stderr=subprocess.PIPE if rank == 0 else subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,
            )
        guard.watch(self._process.pid)
        self._descriptor = os.pidfd_open(self._process.pid)
        if rank == 0:
            self._copier = threading.Thread(target=self._copy_errors, name="rank-0-errors", daemon=True)
            self._copier.start()

    @property
    def descriptor(self) -> int:
        """Readable once the rank has ended."""
        return self._descriptor

    def ended(self) -> bool:
        # Not reaped: so long nobody else can have the group's number.
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def ask_to_stop(self) -> None:
        os.kill(self._process.pid, signal.SIGTERM)

    def kill(self) -> None:
        """The rank and its children. Harmless if they have ended."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def reap(self) -> int:
        """Waits for the end, and ends what the rank left behind. The exit code, or minus the signal."""
        os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        self.kill()
        self._guard.release(self._process.pid)
        os.close(self._descriptor)
        if self._copier is not None:
            self._copier.join(COPY_GRACE_S)
        return self._process.wait()

    def log_end(self) -> list[str]:
        """The last lines that this process wrote to its log."""
        with self.log_path.open("rb") as log:
            log.seek(self._log_start)
            lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-LOG_LINES_SHOWN:]

    def _copy_errors(self) -> None:
        errors = self._process.stderr
        assert errors is not None
        with errors, self.log_path.open("ab", buffering=0) as log:
            while piece := os.read(errors.fileno(), 1 << 16):
                for copy in (sys.stderr.fileno(), log.fileno()):
                    with contextlib.suppress(OSError):  # one may be gone, or full; the other is not
                        os.write(copy, piece)


def rank_environment(
    base: Mapping[str, str], rank: int, world_size: int, port: int, device: str
) -> dict[str, str]:
    """What torchrun would set for `rank` on one machine, and threads that fit ranks which share its cores."""
    environment = dict(base) | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONUNBUFFERED": "1",
    }
    if device == "cpu":
        # Threads that wait by spinning starve the other ranks and the server.
        environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"} | environment
    return environment
