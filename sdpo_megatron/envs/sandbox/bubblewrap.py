"""The sandbox made of namespaces: bubblewrap, which an ordinary user may start where the kernel allows it."""

import json
import math
import os
import shutil
import signal
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import ClassVar

from sdpo_megatron.envs.sandbox.base import LimitName, Limits, Outcome, Program, SandboxFault
from sdpo_megatron.envs.sandbox.seccomp import KERNEL, PROCESSES, compiled
from sdpo_megatron.envs.sandbox.users import another_user
from sdpo_megatron.envs.sandbox.watched import Watched, watch

NOBODY = "65534"
WORK = "/tmp"
"""The working directory inside: private, in memory, and gone with the program."""
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/alternatives")
"""What is shown of the machine, read-only, where it exists."""
OPEN_FILES = 256
OWN_PROCESSES = 1
"""bubblewrap's first process inside counts as one of the program's user."""
SYSTEM_PYTHON = "/usr/bin/python3"


class Bubblewrap:
    """Runs each program in namespaces of its own: nothing of the machine but the system's read-only files, no network,
    no foreign process, no environment. Which file it may read, it may also show; /usr should hold no secret."""

    name: ClassVar[str] = "bubblewrap"

    def __init__(self, python: str = SYSTEM_PYTHON, shown: Sequence[str] = ()):
        """`python` is the interpreter, `shown` are directories of the machine, with its library, which are shown
        read-only too. Raises SandboxFault where a tool that this needs is not installed."""
        self.python, self.shown = python, tuple(shown)
        self._start, self._prlimit = [_tool("bwrap")], _tool("prlimit")
        self._filter = compiled([*KERNEL, *PROCESSES])
        if another_user():
            # root's processes count against no limit: they are started as somebody who owns nothing
            somebody = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
            self._start = [_tool("setpriv"), *somebody, "--", *self._start]

    def run(self, program: Program, limits: Limits) -> Outcome:
        """Runs the program and returns once all of its processes are gone. Raises SandboxFault."""
        with ExitStack() as stack:

            def in_memory(content: bytes) -> int:
                fd = os.memfd_create("sandbox")
                stack.callback(os.close, fd)
                with open(fd, "wb", closefd=False) as file:
                    file.write(content)
                os.lseek(fd, 0, os.SEEK_SET)
                return fd

            files = {name: in_memory(content) for name, content in program.files.items()}
            stdin_fd = in_memory(program.stdin)
            report_fds = os.pipe()
            filter_fd = in_memory(self._filter)
            words = [*self._policy(limits, files, report_fds[1]), "--seccomp", str(filter_fd)]
            # by a file, or the program could read them in /proc/1/cmdline
            args_fd = in_memory(b"".join(word.encode() + b"\0" for word in words))
            argv = [self.python if program.argv[0] == "python" else program.argv[0], *program.argv[1:]]
            watched = watch(
                [*self._start, "--args", str(args_fd), "--", self._prlimit, *_rlimits(limits), "--", *argv],
                stdin_fd=stdin_fd,
                pass_fds=[*files.values(), args_fd, filter_fd],
                report_fds=report_fds,
                wall_s=limits.wall_s,
                output_bytes=limits.output_bytes,
            )
        return _outcome(watched, limits)

    def _policy(self, limits: Limits, files: dict[str, int], report_fd: int) -> list[str]:
        """Returns bubblewrap's arguments; what is mounted later lies over what is earlier."""
        size = str(limits.memory_bytes)
        words = ["--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
        words += ["--unshare-cgroup-try", "--disable-userns", "--uid", NOBODY, "--gid", NOBODY]
        words += ["--hostname", "sandbox", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
        words += ["--json-status-fd", str(report_fd), "--clearenv"]
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


def _outcome(watched: Watched, limits: Limits) -> Outcome:
    """Takes the exit code from bubblewrap's own report, on a pipe that the program does not have."""
    code: int | None = None
    for line in watched.report_bytes.splitlines():
        try:
            code = json.loads(line).get("exit-code", code)
        except ValueError as error:
            raise SandboxFault(f"bubblewrap reported {line[:80]!r}") from error
    if code is None and watched.ended_for is None:
        said = watched.stderr_bytes.decode(errors="replace").strip()
        raise SandboxFault(f"bubblewrap ran no program: {said[-400:] or 'it said nothing'}")
    limit: LimitName | None = watched.ended_for
    ended_by = code - 128 if code is not None and code > 128 else None
    if limit is not None:
        code = ended_by = None
    elif ended_by == signal.SIGXCPU or (ended_by == signal.SIGKILL and watched.wall_s >= limits.cpu_s):
        limit = "cpu"
    return Outcome(
        exit_code=code if ended_by is None else None,
        signal=ended_by,
        stdout_bytes=watched.stdout_bytes,
        stderr_bytes=watched.stderr_bytes,
        limit=limit,
        wall_s=watched.wall_s,
    )


def _tool(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path="/usr/bin:/bin:/usr/sbin:/sbin")
    if found is None:
        package = "bubblewrap" if name == "bwrap" else "util-linux"
        raise SandboxFault(f"{name} is not installed: install the system package {package}")
    return str(Path(found).resolve())
