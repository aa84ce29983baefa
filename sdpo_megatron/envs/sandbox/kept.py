"""Sandboxes whose programs a small process of its own starts and ends: `keeper.py`, asked by one program at a time."""

import base64
import json
import math
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

from sdpo_megatron.envs.sandbox import users
from sdpo_megatron.envs.sandbox.base import Limits, Outcome, Program, SandboxFault
from sdpo_megatron.envs.sandbox.watched import CHUNK_BYTES, GONE_WITHIN_S

KEEPER = Path(__file__).with_name("keeper.py")


class Kept:
    """Runs programs by keepers, as many as there are calls at one time. Safe from several threads; a process that was
    forked starts keepers of its own."""

    name: ClassVar[str]
    policy: dict[str, Any] | None = None
    """What the keeper hands to sandlock, and a filter of system calls; None runs programs without confinement."""

    def __init__(self, python: str):
        self.python = python
        self._idle: list[_Keeper] = []
        self._lock = threading.Lock()
        self._pid = os.getpid()

    def run(self, program: Program, limits: Limits) -> Outcome:
        """Runs the program and returns once all of its processes are gone. Raises SandboxFault."""
        began = time.monotonic()
        argv = [self.python if program.argv[0] == "python" else program.argv[0], *program.argv[1:]]
        request = {
            "argv": argv,
            "files": {name: base64.b64encode(content).decode() for name, content in program.files.items()},
            "stdin": base64.b64encode(program.stdin).decode(),
            "limits": {
                "cpu_s": math.ceil(limits.cpu_s),
                "wall_s": limits.wall_s,
                "memory_bytes": limits.memory_bytes,
                "processes": limits.processes,
                "output_bytes": limits.output_bytes,
                "file_bytes": limits.file_bytes,
            },
            "policy": self.policy,
        }
        keeper = self._borrow()
        try:
            answer = keeper.ask(request, limits.wall_s + GONE_WITHIN_S)
        except BaseException:
            keeper.end()
            raise
        with self._lock:
            self._idle.append(keeper)
        return _outcome(answer, limits, time.monotonic() - began)

    def _borrow(self) -> "_Keeper":
        with self._lock:
            if self._pid != os.getpid():
                self._idle, self._pid = [], os.getpid()
            if self._idle:
                return self._idle.pop()
        return _Keeper(confined=self.policy is not None)


class _Keeper:
    """One keeper process, with a folder for its programs' files."""

    def __init__(self, confined: bool):
        user = users.another_user()
        self._folder = Path(tempfile.mkdtemp(prefix="sandbox-"))
        if user:
            os.chown(self._folder, user, user)
        mode = "confined" if confined else "bare"
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-S", str(KEEPER), str(self._folder), str(user), mode],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                # sandlock's threads are as many as the machine's cores otherwise, and a user need have no home
                env={"PYTHONPATH": os.pathsep.join(sys.path), "TOKIO_WORKER_THREADS": "1", "HOME": "/"},
                cwd="/",
                start_new_session=True,  # a Ctrl-C is not for it
            )
        except OSError as error:
            shutil.rmtree(self._folder)
            raise SandboxFault(f"{sys.executable} does not start: {error}") from error

    def ask(self, request: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """Returns the keeper's answer. Raises SandboxFault where none comes in time."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        deadline = time.monotonic() + limit_s
        answer = b""
        try:
            stdin.write(json.dumps(request).encode() + b"\n")
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
        shutil.rmtree(self._folder, ignore_errors=True)  # the keeper did, if it could

    def _last_words(self) -> str:
        assert self._process.stderr is not None
        code = self._process.wait()
        said = self._process.stderr.read().decode(errors="replace").strip().splitlines()
        return said[-1] if said else f"exit code {code}"


def _outcome(answer: dict[str, Any], limits: Limits, wall_s: float) -> Outcome:
    if answer["fault"]:
        said = base64.b64decode(answer["stderr"]).decode(errors="replace").strip().splitlines()
        raise SandboxFault("; ".join([answer["fault"], *said[-1:]]))
    status, limit = answer["status"], answer["ended_for"]
    code = ended_by = None
    if limit is None:
        if os.WIFSIGNALED(status):
            ended_by = os.WTERMSIG(status)
        elif os.WEXITSTATUS(status) > 128:
            ended_by = os.WEXITSTATUS(status) - 128
        else:
            code = os.WEXITSTATUS(status)
        if ended_by == signal.SIGXCPU or (ended_by == signal.SIGKILL and wall_s >= limits.cpu_s):
            limit = "cpu"
    return Outcome(
        exit_code=code,
        signal=ended_by,
        stdout_bytes=base64.b64decode(answer["stdout"])[: limits.output_bytes],
        stderr_bytes=base64.b64decode(answer["stderr"])[: limits.output_bytes],
        limit=limit,
        wall_s=wall_s,
    )
