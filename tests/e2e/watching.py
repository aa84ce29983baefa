"""What anybody on the machine can see of a run: its listeners, processes, files, and what it leaves."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

LISTENING = "0A"


def descendants(root: int) -> list[int]:
    """`root` and all processes under it."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            stat = read(entry / "stat").rpartition(b")")[2].split()
            if len(stat) > 1:
                parents[int(entry.name)] = int(stat[1])
    found = [root]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def sockets(process: int) -> Iterator[str]:
    """The inodes of its sockets."""
    try:
        for descriptor in os.listdir(f"/proc/{process}/fd"):
            try:
                target = os.readlink(f"/proc/{process}/fd/{descriptor}")
            except OSError:
                continue
            if found := re.fullmatch(r"socket:\[(\d+)\]", target):
                yield found[1]
    except OSError:
        return


def listeners(processes: list[int]) -> set[str]:
    """Addresses on which they listen, in hexadecimal digits, with the port."""
    own = {inode for process in processes for inode in sockets(process)}
    found = set()
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            parts = line.split()
            is_open = parts[3] == LISTENING or (table.startswith("udp") and parts[3] == "07")
            if is_open and parts[9] in own:
                found.add(parts[1])
    return found


def is_loopback(address: str) -> bool:
    """An address as /proc/net has it: words of four bytes, each the wrong way round."""
    host = address.partition(":")[0]
    return (
        host.endswith("7F")
        if len(host) == 8
        else host in ("0" * 24 + "01000000", "0" * 16 + "FFFF00000100007F")
    )


def shared_memory(processes: list[int]) -> set[Path]:
    """The segments that they have mapped; a semaphore's name is another in their maps."""
    inodes = set()
    for process in processes:
        for line in read(Path(f"/proc/{process}/maps")).decode(errors="replace").splitlines():
            if " /dev/shm/" in line:
                inodes.add(int(line.split()[4]))
    return {Path(entry) for entry in os.scandir("/dev/shm") if entry.inode() in inodes}


def bound_files(processes: list[int]) -> set[Path]:
    """The files of their Unix sockets."""
    own = {inode for process in processes for inode in sockets(process)}
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return {Path(parts[7]) for parts in lines if len(parts) > 7 and parts[6] in own and parts[7][0] == "/"}


def files_with(secret: bytes, *directories: Path) -> list[Path]:
    files = [path for directory in directories for path in directory.rglob("*") if path.is_file()]
    return [path for path in files if secret in read(path)]


def processes_with(secret: bytes, processes: list[int]) -> list[int]:
    """Those that show it to others: by their command lines, or to their own user by their environments."""
    return [
        process
        for process in processes
        if any(secret in read(Path(f"/proc/{process}/{name}")) for name in ("cmdline", "environ"))
    ]
