"""Runs programs one after another for the process at its standard input, and ends what they leave behind.

    python -P -S keeper.py FOLDER USER bubblewrap|sandlock|nothing

It reads requests from its standard input, pickles, and answers each by a line of JSON on its standard output.

A script of its own (standard library and sandlock only), because what starts a program must be small, may belong to
another user, and outlives the process that asks long enough to end the program. FOLDER is an empty directory for the
programs' files, which bubblewrap needs none for; USER is a number to become, or 0 to stay who one is; the last is what
confines the programs. `kept.py` is the other side.
"""

import base64
import ctypes
import json
import os
import pickle
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 1, 4, 36
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
CHUNK_BYTES = 1 << 16
OPEN_FILES = 64
DISK_EVERY_S = 0.1
ENDS_ITSELF_S = 0.01
"""What bubblewrap leaves behind ends within, which costs less than reading the whole process table."""
OTHER_TASKS = 64
"""Processes and threads that the user may start elsewhere while a program runs."""
OWN_TASKS = 8
"""Those that confine a program, where nobody else is of its user."""
HEADROOM_BYTES = 512 << 20
"""Address space that whatever confines a program may use beyond the program's own."""
FAULT_CODE = 125
REPORT_FD = 20
"""Where bubblewrap reports; what it reads has the numbers that follow."""
LIBC = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    folder, user, confined_by = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    if confined_by == "sandlock":
        import sandlock._sdk  # noqa: F401  now, while its files can still be read
    if user:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        _prctl(PR_SET_DUMPABLE, 1)  # or the sandbox could not look into its own child
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        while True:
            print(
                json.dumps(_answer(pickle.load(sys.stdin.buffer), folder, bool(user), confined_by)),
                flush=True,
            )
    except (EOFError, pickle.UnpicklingError):  # whoever asked is gone
        _remove(folder)


def _answer(request: dict[str, Any], folder: str, own_user: bool, confined_by: str) -> dict[str, Any]:
    """Runs one program. Returns its wait status, its output, the limit that ended it, and what confines it reports."""
    work = folder and os.path.join(folder, "work")
    try:
        if work:
            os.mkdir(work)
        for name, content in request["files"].items():
            path = Path(work, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        limits = request["limits"]
        streams = [os.pipe() for _ in range(3)]
        deadline = time.monotonic() + limits["wall_s"]
        child = os.fork()
        if child == 0:
            _become_program(request, work, streams, own_user, confined_by)
        for _, write_fd in streams:
            os.close(write_fd)
        watch = Watch(child, [read_fd for read_fd, _ in streams], limits, work)
        status, ended_for = watch.until_all_has_ended(deadline)
    finally:
        _remove(work)
    report, out, err = (bytes(kept) for kept in watch.kept)
    return {
        "status": status,
        "ended_for": ended_for,
        "report": report.decode(errors="replace"),
        "stdout": base64.b64encode(out).decode(),
        "stderr": base64.b64encode(err).decode(),
    }


class Watch:
    """The program's streams, its time and its disk; the first stream is what whatever confines it reports."""

    def __init__(self, child: int, fds: list[int], limits: dict[str, float], work: str):
        self.child, self.fds, self.limits, self.work = child, fds, limits, work
        self.kept = [bytearray() for _ in fds]
        self.status: int | None = None

    def until_all_has_ended(self, deadline: float) -> tuple[int | None, str | None]:
        """Returns the wait status of the program, and the limit for which it was ended, if it was."""
        pidfd = os.pidfd_open(self.child)
        open_fds, ended_for = set(self.fds), None
        next_look = time.monotonic() + DISK_EVERY_S
        while True:
            now = time.monotonic()
            if now >= deadline:
                ended_for = "wall"
            elif now >= next_look:
                next_look = now + DISK_EVERY_S
                if _size_bytes(self.work) > self.limits["memory_bytes"]:
                    ended_for = "disk"
            if ended_for:
                break
            until_s = max(0.0, min(deadline, next_look) - now)
            ready, _, _ = select.select([0, pidfd, *open_fds], [], [], until_s)
            if pidfd in ready:
                break
            if 0 in ready:  # whoever asked is gone
                self.end_all()
                _remove(os.path.dirname(self.work))
                os._exit(0)
            open_fds -= {fd for fd in ready if fd in open_fds and not self.read(fd)}
            if any(len(kept) > self.limits["output_bytes"] for kept in self.kept[1:]):
                ended_for = "output"
        os.close(pidfd)
        self.end_all(0.0 if ended_for else ENDS_ITSELF_S)
        for fd in open_fds:  # nobody has the other end any more
            while len(self.kept[self.fds.index(fd)]) <= self.limits["output_bytes"] and self.read(fd):
                pass
        for fd in self.fds:
            os.close(fd)
        full = any(len(kept) > self.limits["output_bytes"] for kept in self.kept[1:])
        return self.status, ended_for or ("output" if full else None)

    def read(self, fd: int) -> bool:
        """Reads once; returns whether more may come."""
        data = os.read(fd, CHUNK_BYTES)
        self.kept[self.fds.index(fd)] += data
        return bool(data)

    def end_all(self, patience_s: float = 0.0) -> None:
        """Ends all descendants: a process that loses its parent becomes a child of this one, so that it takes some
        rounds at most. What ends by itself within `patience_s` need not be looked for."""
        until = time.monotonic() + patience_s
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid and time.monotonic() < until:
                    time.sleep(patience_s / 20)
                    continue
                if not pid:
                    for descendant in _descendants():
                        try:
                            os.kill(descendant, signal.SIGKILL)
                        except ProcessLookupError:
                            pass
                    pid, status = os.waitpid(-1, 0)
            except ChildProcessError:
                return
            if pid == self.child:
                self.status = status


def _descendants() -> list[int]:
    """Returns the ids of all processes below this one."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", "rb", buffering=0) as file:
                    parent = int(file.read().rpartition(b")")[2].split()[1])
            except OSError:  # it ended meanwhile
                continue
            children.setdefault(parent, []).append(int(entry))
    found: list[int] = []
    new = children.get(os.getpid(), [])
    while new:
        found += new
        new = [child for pid in new for child in children.get(pid, [])]
    return found


def _become_program(
    request: dict[str, Any], work: str, streams: list[tuple[int, int]], own_user: bool, confined_by: str
) -> NoReturn:
    """In the child: sets the limits and becomes the program, or what confines it. Never returns."""
    report_fd = streams[0][1]
    try:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # by Python
            signal.signal(ignored, signal.SIG_DFL)
        _hand_over(request["stdin"], 0)
        os.dup2(streams[1][1], 1)
        os.dup2(streams[2][1], 2)
        if confined_by == "bubblewrap":  # which sets the limits inside
            os.dup2(report_fd, REPORT_FD)
            for fd, content in request["fds"].items():
                _hand_over(content, fd)
            os.execve(request["argv"][0], request["argv"], {})
        limits = request["limits"]
        _limit(limits, own_user, HEADROOM_BYTES if confined_by == "sandlock" else 0)
        os.chdir(work)
        env = {"PATH": "/usr/bin:/bin", "HOME": work, "LANG": "C.UTF-8"}
        if confined_by == "sandlock":
            _in_sandlock(request["argv"], request["policy"], limits, work, env)
        if confined_by == "nothing":
            os.execve(request["argv"][0], request["argv"], env)
    except BaseException as error:
        # told, whatever it was: the parent cannot see it otherwise
        os.write(report_fd, f"{type(error).__name__}: {error}".encode()[:4096])
    os._exit(FAULT_CODE)


def _hand_over(content: bytes, fd: int) -> None:
    """Opens what is to be read there, in memory."""
    file = os.memfd_create("sandbox")
    with open(file, "wb", closefd=False) as stream:
        stream.write(content)
    os.lseek(file, 0, os.SEEK_SET)
    os.dup2(file, fd)
    os.close(file)


def _limit(limits: dict[str, int], own_user: bool, headroom_bytes: int) -> None:
    cpu_s, processes = limits["cpu_s"], limits["processes"]
    # the kernel counts all that the user has
    others = _tasks_of_user() + (OWN_TASKS if own_user else OTHER_TASKS)
    memory_bytes = limits["memory_bytes"] + headroom_bytes
    for what, value, most in (
        (resource.RLIMIT_CPU, cpu_s, cpu_s + 1),  # the first can be ignored, the second not
        (resource.RLIMIT_AS, memory_bytes, memory_bytes),
        (resource.RLIMIT_NPROC, processes + others, processes + others),
        (resource.RLIMIT_FSIZE, limits["file_bytes"], limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_MEMLOCK, 0, 0),
    ):
        hard = resource.getrlimit(what)[1]
        bound = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (min(value, bound), bound))


class FilterProgram(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


def _refuse_calls(code: bytes) -> None:
    """Installs a filter of system calls, an array of struct sock_filter, in this process and what it starts."""
    program = FilterProgram(len(code) // 8, code)
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    _prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(program))


def _in_sandlock(
    argv: list[str], policy: dict[str, Any], limits: dict[str, int], work: str, env: dict[str, str]
) -> NoReturn:
    """Runs the program in sandlock and ends as it ended."""
    import sandlock

    _refuse_calls(policy["filter"])
    writable = [work, "/dev/null"]
    box = sandlock.Sandbox(
        **{
            **policy["sandlock"],
            "fs_writable": writable,
            "cwd": work,
            "env": env,
            "max_processes": limits["processes"],
        },
        clean_env=True,
    )
    process = box.popen(argv)
    pid = process.pid
    if pid is not None:
        try:
            resource.prlimit(pid, resource.RLIMIT_AS, (limits["memory_bytes"], limits["memory_bytes"]))
        except ProcessLookupError:  # it ended already
            pass
    result = process.wait()
    if result.error:
        raise OSError(result.error)
    if result.reason != sandlock.ExitReason.EXITED:
        os.kill(os.getpid(), result.signal if result.signal > 0 else signal.SIGKILL)
        time.sleep(60)
    os._exit(result.exit_code)


def _tasks_of_user() -> int:
    found = 0
    for entry in os.listdir("/proc"):
        try:
            if entry.isdigit() and os.stat(f"/proc/{entry}").st_uid == os.getuid():
                found += len(os.listdir(f"/proc/{entry}/task"))
        except OSError:  # it ended meanwhile
            continue
    return found


def _size_bytes(folder: str) -> int:
    """Returns what lies in it; what cannot be looked into, or no folder, counts as nothing."""
    size = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                size += os.lstat(os.path.join(path, name)).st_blocks * 512
            except OSError:  # removed meanwhile
                continue
    return size


def _remove(folder: str) -> None:
    """Removes a folder, if there is one, in whatever state a program left it."""
    if not folder:
        return
    try:
        shutil.rmtree(folder)
    except (OSError, RecursionError):
        # directories without rights, or deeper than a path may be long
        for command in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
            subprocess.run(
                [f"/bin/{command[0]}", *command[1:], "--", folder], stderr=subprocess.DEVNULL, check=False
            )


def _prctl(option: int, value: int, address: int = 0) -> None:
    if LIBC.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(address), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


if __name__ == "__main__":
    main()
