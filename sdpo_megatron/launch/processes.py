"""Child processes that are started, logged and ended with all of their own, and never left behind."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from sdpo_megatron.errors import RunFailed
from sdpo_megatron.launch.kill_orphans import group_members

DIE_WITH_PARENT = Path(__file__).with_name("die_with_parent.py")
KILL_ORPHANS = Path(__file__).with_name("kill_orphans.py")
LOG_LINES_SHOWN = 20
COPY_GRACE_S = 2.0
KILL_GRACE_S = 20.0
POLL_S = 0.05
HIDDEN = b"(hidden)"
ON_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
"""What has process groups listen on no interface that another machine can reach. gloo takes the host's name otherwise,
whatever that resolves to."""


class Guard:
    """A process that kills the process groups it was told of, should this one end without releasing them, and removes
    what they leave in shared memory and in their private directories."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(KILL_ORPHANS)], stdin=subprocess.PIPE, start_new_session=True
        )

    def watch(self, group: int, directory: Path | None = None) -> None:
        """`directory` is the group's own and goes with it."""
        self._tell(f"+{group} {directory or ''}\n")

    def release(self, group: int) -> None:
        """Stops watching a group that is gone: its number may soon be another's."""
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
            os.write(self._process.stdin.fileno(), os.fsencode(line))


class ChildProcess:
    """A command in a session and process group of its own: Ctrl-C in the terminal does not reach it.

    It dies with the thread that made it (see die_with_parent.py); the children it has itself do by `end`, or by its
    guard."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        log_path: Path,
        *,
        on_terminal: bool = False,
        secret: str | None = None,
        guard: Guard | None = None,
        directory: Path | None = None,
    ) -> None:
        """Starts `command`. What it writes goes to the end of `log_path`, without the `secret`; with `on_terminal` its
        output goes to our own instead, and its errors to both. The `guard` watches its group, to which `directory`
        belongs, until `end`."""
        self.log_path, self._guard = log_path, guard
        self._copier: threading.Thread | None = None
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(DIE_WITH_PARENT), str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=None if on_terminal else subprocess.PIPE if secret else log,
                stderr=subprocess.PIPE if on_terminal else subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,
            )
        if guard is not None:
            guard.watch(self.pid, directory)
        self.descriptor = os.pidfd_open(self._process.pid)
        """Is readable once the process has ended."""
        if on_terminal or secret:
            copy = self._copy_errors if secret is None else lambda: self._copy_without(secret)
            self._copier = threading.Thread(target=copy, name="child-output", daemon=True)
            self._copier.start()

    @property
    def pid(self) -> int:
        """The id of the process, and of its process group."""
        return self._process.pid

    def exit_code(self) -> int | None:
        """Returns the exit code: None while the process runs; minus the signal where one ended it."""
        # Not reaped: so long nobody else can have the group's number.
        ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    def ended(self) -> bool:
        return self.exit_code() is not None

    def ask_to_stop(self) -> None:
        os.kill(self.pid, signal.SIGTERM)
        # what somebody has stopped must run to save
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """Kills the process and its children without waiting for them. Harmless if they have ended."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def end(self, grace_s: float = 0.0) -> int:
        """Ends the process and its children, which may have ended already: asks it to stop where `grace_s` is not 0,
        and kills what is left after so many seconds. Must be called once, as the last of all; returns the exit code.

        Raises RunFailed where something outlives SIGKILL."""
        if grace_s and not self.ended():
            self.ask_to_stop()
            wait_until(self.ended, grace_s)
        self.kill()
        if not wait_until(lambda: not group_members(self.pid), KILL_GRACE_S):
            raise RunFailed(
                f"Processes of group {self.pid} outlived SIGKILL by {KILL_GRACE_S:g} seconds, as where a device or a "
                f"file system does not answer: look at them (ps -g {self.pid})."
            )
        if self._guard is not None:
            self._guard.release(self.pid)
        os.close(self.descriptor)
        if self._copier is not None:
            self._copier.join(COPY_GRACE_S)
        return self._process.wait()

    def log_end(self) -> list[str]:
        """Returns the last lines that this process wrote to its log."""
        if self._copier is not None and self._process.returncode is None and self.ended():
            self._copier.join(COPY_GRACE_S)
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
                    # one may be gone, or full; the other is not
                    with contextlib.suppress(OSError):
                        os.write(copy, piece)

    def _copy_without(self, secret: str) -> None:
        output, redact = self._process.stdout, Redactor(secret)
        assert output is not None
        with output, self.log_path.open("ab", buffering=0) as log:
            while piece := os.read(output.fileno(), 1 << 16):
                # a full disk must not hold up what writes here
                with contextlib.suppress(OSError):
                    log.write(redact(piece))
            with contextlib.suppress(OSError):
                log.write(redact.rest())


def is_stopped(pid: int) -> bool:
    """Returns whether a process is stopped, by SIGSTOP or a debugger."""
    # it may have ended just now
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    return False


class Redactor:
    """Takes a secret out of bytes that come piece by piece."""

    def __init__(self, secret: str) -> None:
        self._secret = secret.encode()
        self._held = b""

    def __call__(self, piece: bytes) -> bytes:
        """Returns what may be written now: all but an end that may be the secret's beginning."""
        text = (self._held + piece).replace(self._secret, HIDDEN)
        lengths = range(min(len(text), len(self._secret) - 1), 0, -1)
        held = next((length for length in lengths if text.endswith(self._secret[:length])), 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def rest(self) -> bytes:
        """Returns what was held back, at the end."""
        return self._held


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Waits, and returns whether the condition came true within the time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def kept_temporary_files(directory: Path) -> dict[str, str]:
    """Returns the variables that lead a process's temporary files into `directory`, which may go with it: but not what
    it compiles, for the next one."""
    compiled = os.environ.get("TORCHINDUCTOR_CACHE_DIR", os.path.expanduser("~/.cache/torchinductor"))
    return {"TMPDIR": str(directory), "TORCHINDUCTOR_CACHE_DIR": compiled}


def rank_environment(rank: int, world_size: int, device: str, *, on_loopback: bool) -> dict[str, str]:
    """Returns our own environment with what torchrun would set for `rank` on one machine, but for where ranks meet, and
    threads that fit ranks which share its cores. `on_loopback`: whether nothing of what they are connected with is on
    another machine."""
    environment = dict(os.environ) | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "PYTHONUNBUFFERED": "1",
    }
    if on_loopback:
        environment |= ON_LOOPBACK
    if device == "cpu":
        # Threads that wait by spinning starve the other ranks and the server.
        environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"} | environment
    return environment
