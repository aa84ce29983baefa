"""The sandbox made of namespaces: bubblewrap, which an ordinary user may start where the kernel allows it."""

import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from sdpo_megatron.envs.sandbox.base import LimitName, Limits, Program, SandboxFault
from sdpo_megatron.envs.sandbox.keeper import REPORT_FD
from sdpo_megatron.envs.sandbox.kept import SYSTEM_PYTHON, Kept
from sdpo_megatron.envs.sandbox.seccomp import KERNEL, PROCESSES, compiled

NOBODY = "65534"
WORK = "/tmp"
"""The working directory inside: private, in memory, and gone with the program."""
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/alternatives")
"""What is shown of the machine, read-only, where it exists."""
OPEN_FILES = 256
OWN_PROCESSES = 1
"""bubblewrap's first process inside counts as one of the program's user."""


class Bubblewrap(Kept):
    """Runs each program in namespaces of its own: nothing of the machine but the system's read-only files, no network,
    no foreign process, no environment. Which file it may read, it may also show; /usr should hold no secret."""

    name: ClassVar[str] = "bubblewrap"
    confined_by = "bubblewrap"

    def __init__(self, python: str = SYSTEM_PYTHON, shown: Sequence[str] = ()):
        """As of Kept. Raises SandboxFault where a tool that this needs is not installed."""
        super().__init__(python, shown)
        self._bwrap, self._prlimit = _tool("bwrap"), _tool("prlimit")
        self._filter = compiled([*KERNEL, *PROCESSES])

    def _request(self, program: Program, limits: Limits) -> dict[str, Any]:
        """Returns what the keeper is asked: to start bubblewrap, which reads all that it is given from descriptors."""
        request = super()._request(program, limits)
        args_fd, filter_fd, first_fd = range(REPORT_FD + 1, REPORT_FD + 4)
        files = {name: fd for fd, name in enumerate(program.files, start=first_fd)}
        words = self._policy(limits, files)
        words += ["--json-status-fd", str(REPORT_FD), "--seccomp", str(filter_fd)]
        # by a file, or the program could read them in /proc/1/cmdline
        args = b"".join(word.encode() + b"\0" for word in words)
        fds = {files[name]: content for name, content in program.files.items()}
        start = [self._bwrap, "--args", str(args_fd), "--", self._prlimit, *_rlimits(limits), "--"]
        return request | {
            "argv": [*start, *request["argv"]],
            "files": {},
            "fds": fds | {args_fd: args, filter_fd: self._filter},
        }

    def _exit_code(self, status: int, ended_for: LimitName | None, report: str, err: bytes) -> int | None:
        """Takes it from bubblewrap's own report, on a pipe that the program does not have."""
        code: int | None = None
        for line in report.splitlines():
            try:
                code = json.loads(line).get("exit-code", code)
            except ValueError as error:
                raise SandboxFault(f"bubblewrap reported {line[:80]!r}") from error
        if code is None and ended_for is None:
            said = err.decode(errors="replace").strip()
            raise SandboxFault(f"bubblewrap ran no program: {said[-400:] or 'it said nothing'}")
        return code

    def _policy(self, limits: Limits, files: dict[str, int]) -> list[str]:
        """Returns bubblewrap's arguments; what is mounted later lies over what is earlier."""
        size = str(limits.memory_bytes)
        words = ["--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
        words += ["--unshare-cgroup-try", "--disable-userns", "--uid", NOBODY, "--gid", NOBODY]
        words += ["--hostname", "sandbox", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
        words += ["--clearenv"]
        for name, value in {"PATH": "/usr/bin:/bin", "HOME": WORK, "LANG": "C.UTF-8"}.items():
            words += ["--setenv", name, value]
        for path in SYSTEM:
            if os.path.islink(path) and not os.path.isabs(os.readlink(path)):
                words += ["--symlink", os.readlink(path), path]
            else:
                words += ["--ro-bind-try", path, path]
        for path in self.shown:
            words += ["--ro-bind", path, path]
        # no /proc: bubblewrap's own process inside, of the same user, could be written to by it
        words += ["--dev", "/dev", "--size", size, "--tmpfs", "/dev/shm"]
        words += ["--size", size, "--tmpfs", WORK]
        for name, fd in files.items():
            words += ["--file", str(fd), f"{WORK}/{name}"]
        return [*words, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", WORK]


def _rlimits(limits: Limits) -> list[str]:
    """Set inside the new user namespace, so that processes are counted by program and not by user."""
    cpu_s = math.ceil(limits.cpu_s)
    processes = limits.processes + OWN_PROCESSES
    return [
        f"--cpu={cpu_s}:{cpu_s + 1}",  # the first can be ignored, the second not
        f"--as={limits.memory_bytes}:{limits.memory_bytes}",
        f"--nproc={processes}:{processes}",
        f"--fsize={limits.file_bytes}:{limits.file_bytes}",
        f"--nofile={OPEN_FILES}:{OPEN_FILES}",
        "--core=0:0",
        "--memlock=0:0",
    ]


def _tool(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path="/usr/bin:/bin:/usr/sbin:/sbin")
    if found is None:
        package = "bubblewrap" if name == "bwrap" else "util-linux"
        raise SandboxFault(f"{name} is not installed: install the system package {package}")
    return str(Path(found).resolve())
