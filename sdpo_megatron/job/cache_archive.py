"""Compiled code as one file: a tar archive with a checksum of each member, whole or not there."""

import hashlib
import io
import os
import tarfile
import tempfile
import time
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

from sdpo_megatron.files import opened_atomically

MOST_BYTES = 4 << 30
"""More is not kept: it would be longer in reading than in compiling."""
CHECKSUM, ROOT = "sdpo.sha256", "sdpo.root"
OWN = (".filling.lock", ".filled", ".unpacking-")
"""Names of ours below the root: a lock, a mark, and the begin of a directory's."""
LEFT_OUT = ("lock", "*.lock", OWN[1], f"{OWN[2]}*", "tmp.pid_*", "gpu_p2p_access_cache_for_*")
"""Names of what another node must not have: locks, what is half written, and what is of one node's wiring."""
DAMAGES = (OSError, tarfile.TarError, ValueError, EOFError)
"""What reading an archive raises that is cut, changed or none."""
TRITON_GROUP = "__grp__*.json"
"""Triton's own lists of a kernel's files, by absolute paths."""
Contents = Mapping[str, int]
"""Bytes of each file, by its path below the root."""


class NotKept(Exception):
    """Compiled code is not kept this time; the message says why."""


def contents_of(root: Path) -> dict[str, int]:
    """Returns the files below `root` that may be kept."""
    found: dict[str, int] = {}
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not _left_out(name))
        for name in sorted(names):
            path = Path(folder, name)
            if not _left_out(name) and path.is_file() and not path.is_symlink():
                found[str(path.relative_to(root))] = path.stat().st_size
    return found


def contents_in(archive: Path) -> dict[str, int]:
    """Returns the same of an archive; nothing of one that is damaged or not there."""
    try:
        with tarfile.open(archive, "r:") as tar:
            return {member.name: member.size for member in tar}
    except DAMAGES:
        return {}


def pack(root: Path, contents: Contents, archive: Path, limit_s: float) -> None:
    """Replaces `archive` by the files below `root` that `contents` names, in one step.

    Raises NotKept where they are too large, change meanwhile or take longer than `limit_s`, OSError where it cannot be
    written."""
    size = sum(contents.values())
    if size > MOST_BYTES:
        raise NotKept(f"it has {size / 2**30:.1f} GiB, and at most {MOST_BYTES >> 30} are kept")
    end = time.monotonic() + limit_s
    archive.parent.mkdir(exist_ok=True)
    for killed in archive.parent.glob(f".{archive.name}.*"):
        killed.unlink(missing_ok=True)
    headers = {ROOT: str(root)}
    with (
        opened_atomically(archive) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, pax_headers=headers) as tar,
    ):
        for name, expected in contents.items():
            if time.monotonic() > end:
                raise NotKept(f"writing it takes longer than {limit_s:g} s")
            content, member = (root / name).read_bytes(), tar.gettarinfo(root / name, name)
            if len(content) != expected or member.size != expected:
                raise NotKept(f"{name} changes meanwhile")
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            member.pax_headers = {CHECKSUM: hashlib.sha256(content).hexdigest()}
            tar.addfile(member, io.BytesIO(content))


def unpack(archive: Path, root: Path) -> int:
    """Adds what `archive` has to `root`, where a file that is there already stays. Returns how many files it has.

    Raises one of DAMAGES, and adds nothing, where it is damaged or would write elsewhere."""
    with tempfile.TemporaryDirectory(prefix=OWN[2], dir=root) as own:
        count = _extract(archive, Path(own), root)
        _merge(Path(own), root)
    return count


def _extract(archive: Path, own: Path, root: Path) -> int:
    with tarfile.open(archive, "r:") as tar:
        members = tar.getmembers()
        if sum(member.size for member in members) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES >> 30} GiB")
        for member in members:
            content = tar.extractfile(member) if member.isreg() else None
            if content is None or member.name.startswith("/"):
                raise ValueError(f"{member.name} is no file below it")
            if hashlib.sha256(content.read()).hexdigest() != member.pax_headers.get(CHECKSUM):
                raise ValueError(f"{member.name} is not what was kept")
            tar.extract(member, own, filter="data")
            if fnmatch(Path(member.name).name, TRITON_GROUP):
                _move_group(own / member.name, tar.pax_headers.get(ROOT, ""), root)
    return len(members)


def _move_group(group: Path, before: str, root: Path) -> None:
    """Has a list of files name them where they will be: scratch may be another directory in each job."""
    if before and before != str(root):
        group.write_text(
            group.read_text(encoding="utf-8").replace(f'"{before}/', f'"{root}/'), encoding="utf-8"
        )


def _merge(source: Path, target: Path) -> None:
    """Moves what `target` has not yet, whole directories in one step: who looks meanwhile sees no part of an entry."""
    for entry in source.iterdir():
        there = target / entry.name
        if not there.exists():
            entry.rename(there)
        elif entry.is_dir() and there.is_dir():
            _merge(entry, there)


def _left_out(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in LEFT_OUT)
