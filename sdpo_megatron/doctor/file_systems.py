"""Which file system a path is on, and whether other machines see it."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

MOUNTS = Path("/proc/self/mounts")
NETWORK = {
    *("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "glusterfs", "wekafs", "panfs"),
    *("pvfs2", "orangefs", "afs", "9p", "virtiofs", "quobyte", "daos", "gfs2", "ocfs2", "acfs"),
}
MEMORY = {"tmpfs", "ramfs", "devtmpfs"}
LOCAL_IN_USER_SPACE = {"fuse.fuse-overlayfs", "fuseblk"}


@dataclass(frozen=True, kw_only=True)
class FileSystem:
    point: str
    """Where it is mounted."""
    kind: str
    """As the kernel names it."""
    options: tuple[str, ...]

    @property
    def place(self) -> Literal["network", "memory", "local"]:
        """What is a file system in user space is mostly one of a network or of a cloud's storage."""
        if self.kind in NETWORK or (self.kind.startswith("fuse") and self.kind not in LOCAL_IN_USER_SPACE):
            return "network"
        return "memory" if self.kind in MEMORY else "local"

    def __str__(self) -> str:
        return f"{self.kind} at {self.point}, {self.place}"


def nearest_existing(path: Path) -> Path:
    """Returns the path without links, or the last part of it that is there."""
    path = Path(os.path.realpath(path))
    while not os.path.lexists(path):
        path = path.parent
    return path


def file_system_of(path: Path) -> FileSystem:
    """Returns the file system that a path is on, or will be once it is made."""
    path = nearest_existing(path)
    found = FileSystem(point="/", kind="unknown", options=())
    for line in MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        _, point, kind, options = line.split(" ")[:4]
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), point)
        # a later mount at the same place covers an earlier one
        if path.is_relative_to(point) and len(point) >= len(found.point):
            found = FileSystem(point=point, kind=kind, options=tuple(options.split(",")))
    return found
