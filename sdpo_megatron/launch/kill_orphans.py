"""Kills process groups as soon as the process at the other end of its standard input is gone, and removes what they
left outside the run directory.

    python kill_orphans.py    lines on stdin: "+GROUP [DIRECTORY]" watch it, "-GROUP" it has ended

The death signal of launch/die_with_parent.py reaches a child, but not the child's children. Shared memory has no owner
that the system would know: which segments a group made is looked at while it runs. A script of its own (standard
library only) that is cheap to keep waiting.
"""

import contextlib
import os
import re
import select
import shutil
import signal
import sys
import time

POLL_S = 0.25
SETTLED_S = 5.0
"""How long a new segment may lie unused before somebody maps it."""
DEATH_S = 5.0
SHARED_MEMORY = "/dev/shm"
MADE_BY_OURS = re.compile(r"(sem\.mp-|sglang_|psm_|torch_).*")
"""Names that Python, torch and SGLang give; anything else may be somebody's file."""


class Groups:
    """What each watched group has to leave behind."""

    def __init__(self) -> None:
        self.directories: dict[int, str] = {}
        self.segments: dict[int, set[str]] = {}
        self._earlier = set(segments())
        self._seen: dict[str, float] = {}

    def watch(self, group: int, directory: str) -> None:
        self.directories[group] = directory
        self.segments[group] = set()

    def look(self) -> None:
        """Notes which new segments of shared memory the groups have mapped."""
        now = time.monotonic()
        names = [name for name in segments() if name not in self._earlier]
        self._seen = {name: self._seen.get(name, now) for name in names}
        fresh = [name for name, since in self._seen.items() if now - since < SETTLED_S]
        for group in self.segments if fresh else ():
            inodes = {inode for process in group_members(group) for inode in mapped(process)}
            self.segments[group] |= {name for name in fresh if inode_of(name) in inodes}

    def remove_traces(self, group: int) -> None:
        for name in self.segments.pop(group, ()):
            # its owner removed it, as is right
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{SHARED_MEMORY}/{name}")
        directory = self.directories.pop(group, "")
        if directory:
            shutil.rmtree(directory, ignore_errors=True)

    def end(self) -> None:
        self.look()
        for group in self.segments:
            # all of it has ended
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        deadline = time.monotonic() + DEATH_S
        for group in list(self.segments):
            while group_members(group) and time.monotonic() < deadline:
                time.sleep(0.02)
            self.remove_traces(group)


def segments() -> list[str]:
    try:
        return [name for name in os.listdir(SHARED_MEMORY) if MADE_BY_OURS.fullmatch(name)]
    except FileNotFoundError:
        return []


def group_members(group: int) -> list[int]:
    """The living processes of a group, without zombies."""
    found = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        # it ended just now
        with (
            contextlib.suppress(FileNotFoundError, ProcessLookupError),
            open(f"/proc/{process}/stat", "rb") as file,
        ):
            # a process may have any bytes for a name
            state, _parent, its_group = file.read().rpartition(b")")[2].split()[:3]
            if int(its_group) == group and state != b"Z":
                found.append(int(process))
    return found


def inode_of(name: str) -> int | None:
    try:
        return os.stat(f"{SHARED_MEMORY}/{name}").st_ino
    except FileNotFoundError:
        return None


def mapped(process: int) -> set[int]:
    """The inodes of the segments that a process has mapped. Their names there may be others: a semaphore is made under
    one and linked to another."""
    try:
        with open(f"/proc/{process}/maps", errors="replace") as file:
            return {int(line.split(maxsplit=5)[4]) for line in file if f" {SHARED_MEMORY}/" in line}
    # it ended just now, or is another user's
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return set()


def main() -> None:
    # a signal to all of our processes is not the end of this one: it goes last
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    groups, text = Groups(), b""
    while True:
        if select.select([sys.stdin], [], [], POLL_S)[0]:
            piece = os.read(sys.stdin.fileno(), 1 << 16)
            if not piece:
                break
            *lines, text = (text + piece).split(b"\n")
            for line in map(os.fsdecode, lines):
                group, _, directory = line[1:].partition(" ")
                if line[0] == "+":
                    groups.watch(int(group), directory)
                else:
                    groups.remove_traces(int(group))
        groups.look()
    groups.end()


if __name__ == "__main__":
    main()
