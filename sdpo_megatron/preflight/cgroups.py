"""The control groups that this process is in, of version 1 or 2: what containers and batch systems let it have."""

import os
from pathlib import Path
from typing import Literal

CGROUP = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
VERSION_1_UNLIMITED = 1 << 60
"""From here on a limit in bytes of version 1 means that there is none."""


def groups(controller: Literal["memory", "cpu"]) -> list[Path]:
    """Returns the directories of the groups that may limit this process: its own and those around it."""
    found: list[Path] = []
    for line in OWN_GROUPS.read_text(encoding="utf-8").splitlines():
        number, controllers, path = line.split(":", maxsplit=2)
        if number == "0" or controller in controllers.split(","):
            root = CGROUP if number == "0" else CGROUP / controller
            own = Path(os.path.normpath(f"{root}/{path}"))
            # inside a container its path may be that of the machine around it
            found += [place for place in (own, *own.parents) if place.is_relative_to(root) and place.is_dir()]
    return found


def memory_limit(group: Path) -> int | None:
    """Returns the bytes that a group may have; None where it has no limit."""
    for name in ("memory.max", "memory.limit_in_bytes"):
        text = _text(group / name)
        if text is not None:
            return None if text == "max" or int(text) >= VERSION_1_UNLIMITED else int(text)
    return None


def memory_left(group: Path) -> int | None:
    """Returns the bytes that a group has left; None where it has no limit. Files that were read count as free: they
    are dropped when memory is short."""
    most = memory_limit(group)
    if most is None:
        return None
    for usage, cached in (
        ("memory.current", "inactive_file"),
        ("memory.usage_in_bytes", "total_inactive_file"),
    ):
        used, stat = _text(group / usage), _text(group / "memory.stat")
        # of the other version, or not shown to us
        if used is None or stat is None:
            continue
        files = dict(line.split() for line in stat.splitlines()).get(cached, "0")
        return max(0, most - int(used) + int(files))
    return None


def cpu_quota(group: Path) -> float | None:
    """Returns the cores whose time a group may use; None where it has no limit."""
    text = _text(group / "cpu.max")
    if text is None:
        parts = [_text(group / f"cpu.cfs_{what}_us") for what in ("quota", "period")]
    else:
        parts = text.split()
    quota, period = parts
    if quota is None or period is None or quota in ("max", "-1"):
        return None
    return int(quota) / int(period)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    # of the other version, or the root, which has none, or not shown to us
    except OSError:
        return None
