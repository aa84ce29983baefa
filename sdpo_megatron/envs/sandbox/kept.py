"""Sandboxes whose programs a small process of its own starts and ends: `keeper.py`, asked by one program at a time."""

import base64
import json
import math
import os
import pickle
import secrets
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal

from sdpo_megatron.envs.sandbox.base import LimitName, Limits, Outcome, Program, SandboxFault

KEEPER = Path(__file__).with_name("keeper.py")
CHUNK_BYTES = 1 << 16
GONE_WITHIN_S = 10.0
"""Seconds that the kernel may take to end what was killed."""
SYSTEM_PYTHON = "/usr/bin/python3"
CAP_SETUID = 7
FIRST_USER = 1 << 30
"""Users from here on are nobody's, so that no other process is a program's kin."""


class Kept:
    """Runs programs by keepers, as many as there are calls at one time. Safe from several threads; a process that was
    forked starts keepers of its own."""

    name: ClassVar[str]
    confined_by: ClassVar[Literal["bubblewrap", "sandlock", "nothing"]]
    """What a keeper starts a program in."""

    def __init__(self, python: str = SYSTEM_PYTHON, shown: Sequence[str] = ()):
        """`python` is the interpreter, `shown` are directories of the machine, with its library, which programs may
        read."""
        self.python, self.shown = python, tuple(shown)
        self._idle: list[_Keeper] = []
        self._lock = threading.Lock()
        self._pid = os.getpid()

    def run(self, program: Program, limits: Limits) -> Outcome:
        """Runs the program and returns once all of its processes are gone. Raises SandboxFault."""
        began = time.monotonic()
        request = self._request(program, limits)
        keeper = self._borrow()
        try:
            answer = keeper.ask(request, limits.wall_s + GONE_WITHIN_S)
        except BaseException:
            keeper.end()
            raise
        with self._lock:
            self._idle.append(keeper)
        out, err = (base64.b64decode(answer[stream]) for stream in ("stdout", "stderr"))
        code = self._exit_code(answer["status"], answer["ended_for"], answer["report"], err)
        return Outcome.of(code, answer["ended_for"], out, err, time.monotonic() - began, limits)

    def _request(self, program: Program, limits: Limits) -> dict[str, Any]:
        """Returns what the keeper is asked."""
        return {
            "argv": [self.python if program.argv[0] == "python" else program.argv[0], *program.argv[1:]],
            "files": dict(program.files),
            "fds": {},
            "stdin": program.stdin,
            "limits": asdict(limits) | {"cpu_s": math.ceil(limits.cpu_s)},
        }

    def _exit_code(self, status: int, ended_for: LimitName | None, report: str, err: bytes) -> int | None:
        """Returns the program's, minus the signal that ended it; None where a limit did. Raises SandboxFault for what
        was no program's end."""
        if report:
            raise SandboxFault("; ".join([report, *err.decode(errors="replace").strip().splitlines()[-1:]]))
        return None if ended_for else os.waitstatus_to_exitcode(status)

    def _borrow(self) -> "_Keeper":
        with self._lock:
            if self._pid != os.getpid():
                self._idle, self._pid = [], os.getpid()
            if self._idle:
                return self._idle.pop()
        return _Keeper(self.confined_by)


class _Keeper:
    """One keeper process, with a folder for its programs' files where they do not lie in memory."""

    def __init__(self, confined_by: str):
        user = another_user()
        self._folder: Path | None = None
        try:
            if confined_by != "bubblewrap":
                self._folder = Path(tempfile.mkdtemp(prefix="sandbox-"))
                if user:
                    os.chown(self._folder, user, user)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-S", str(KEEPER), str(self._folder or ""), str(user), confined_by],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                # sandlock's threads are as many as the machine's cores otherwise, and a user need have no home
                env={"PYTHONPATH": os.pathsep.join(sys.path), "TOKIO_WORKER_THREADS": "1", "HOME": "/"},
                cwd="/",
                start_new_session=True,  # a Ctrl-C is not for it
            )
        except OSError as error:
            self._remove_folder()
            raise SandboxFault(f"the sandbox's keeper does not start: {error}") from error

    def ask(self, request: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """Returns the keeper's answer. Raises SandboxFault where none comes in time."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        deadline = time.monotonic() + limit_s
        answer = bytearray()
        try:
            pickle.dump(request, stdin)
            stdin.flush()
            while not answer.endswith(b"\n"):
                left_s = deadline - time.monotonic()
                if left_s <= 0 or not select.select([stdout], [], [], left_s)[0]:
                    raise SandboxFault(f"no answer of the sandbox's keeper within {limit_s:.0f} s")
                chunk = os.read(stdout.fileno(), CHUNK_BYTES)
                if not chunk:
                    raise SandboxFault(f"the sandbox's keeper ended: {self._last_words()}")
                answer += chunk
        except BrokenPipeError as error:
            raise SandboxFault(f"the sandbox's keeper ended: {self._last_words()}") from error
        return json.loads(answer)

    def end(self) -> None:
        """Ends the process and removes its folder."""
        with self._process as process:  # closes its pipes, at which it ends what it runs, and then itself
            if process.stdin is not None:
                try:
                    process.stdin.close()
                except BrokenPipeError:  # it is gone
                    pass
            try:
                process.wait(GONE_WITHIN_S)
            except subprocess.TimeoutExpired:
                process.kill()
        self._remove_folder()

    def _remove_folder(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)  # the keeper did, if it could

    def _last_words(self) -> str:
        assert self._process.stderr is not None
        code = self._process.wait()
        said = self._process.stderr.read().decode(errors="replace").strip().splitlines()
        return said[-1] if said else f"exit code {code}"


def another_user() -> int:
    """Returns a user of whom there is no other process, or 0 where this process cannot become another. Programs run as
    that user: root's would have root's rights, and count against no limit."""
    if os.geteuid() != 0:
        return 0
    capabilities = int(Path("/proc/self/status").read_text().partition("CapEff:")[2].split()[0], 16)
    ranges = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    users = FIRST_USER, FIRST_USER * 2 - 1
    known = any(int(first) <= users[0] and users[1] < int(first) + int(n) for first, _, n in ranges)
    if not capabilities >> CAP_SETUID & 1 or not known:
        return 0
    return FIRST_USER + secrets.randbelow(FIRST_USER)


class UnsafeSubprocess(Kept):
    """No sandbox, for machines that are thrown away afterwards: runs each program as the user who asks (root's as a
    user without rights), and it reads, writes and reaches what that user can. Only its limits hold, and that it leaves
    no process behind."""

    name: ClassVar[str] = "unsafe_subprocess"
    confined_by = "nothing"
