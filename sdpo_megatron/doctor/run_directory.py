"""The file system that a run's directory is on: its kind, its speed, its locks."""

import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

from sdpo_megatron.doctor.file_systems import FileSystem, file_system_of, nearest_existing
from sdpo_megatron.doctor.findings import Finding, failure, ok, warning
from sdpo_megatron.files import write_atomically

NAME, SPEED, FILES = "run directory", "run directory: speed", "run directory: files"
BLOCK_BYTES, BLOCKS = 1 << 20, 64
SMALL_FILES = 20
SLOW_BYTES_PER_S = 30 * (1 << 20)
SLOW_FILE_S = 0.25
"""What a small file may take until the disk has it; a step writes several."""
NEEDED_BYTES, COMFORTABLE_BYTES = 1 << 30, 10 << 30
"""The demo's checkpoints, logs and records come to about the second."""
SEEN_WITHIN_S, POLL_S = 5.0, 0.05
ELSEWHERE = "set run.dir to a directory on another file system"


def run_directory(directory: Path) -> list[Finding]:
    """Writes and reads in the directory, or where it will be made; nothing of that is left."""
    directory = directory.absolute()
    place = nearest_existing(directory)
    system = file_system_of(place)
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=place) as own:
            return [_kind(directory, place, system), _speed(Path(own)), _files(Path(own))]
    except OSError as error:
        problem = error.strerror or str(error)
        return [failure(NAME, f"{directory} ({system}) cannot be written: {problem}", ELSEWHERE)]


def _kind(directory: Path, place: Path, system: FileSystem) -> Finding:
    free = shutil.disk_usage(place).free
    found = f"{directory} is on {system}, {free / 2**30:.1f} GiB free"
    figures: dict[str, float | str] = {"kind": system.kind, "place": system.place, "bytes_free": free}
    if free < NEEDED_BYTES:
        return failure(NAME, found, f"free space there, or {ELSEWHERE}", **figures)
    if free < COMFORTABLE_BYTES:
        todo = f"free space there, or {ELSEWHERE}: checkpoints of all but the smallest models need more"
        return warning(NAME, found, todo, **figures)
    if system.place == "memory":
        todo = f"{ELSEWHERE}: what is in memory is lost with the machine, and takes its memory"
        return warning(NAME, found, todo, **figures)
    return ok(NAME, found, **figures)


def _speed(own: Path) -> Finding:
    write_s, read_s = _transfer(own / "block")
    size = BLOCKS * BLOCK_BYTES
    start = time.monotonic()
    for number in range(SMALL_FILES):
        (own / f"new-{number}").write_bytes(b"x")
        (own / f"new-{number}").rename(own / f"small-{number}")
    each_s = (time.monotonic() - start) / SMALL_FILES
    start = time.monotonic()
    listed = sum(entry.name.startswith("small-") for entry in os.scandir(own))
    listing_s = time.monotonic() - start
    found = (
        f"{size / write_s / 2**20:.0f} MiB/s written and on the disk, {size / read_s / 2**20:.0f} MiB/s read; "
        f"{each_s * 1000:.3g} ms to write and rename a small file, {listing_s * 1000:.3g} ms to list {listed}"
    )
    if listed != SMALL_FILES:
        todo = f"{ELSEWHERE}: {SMALL_FILES} files were written and renamed there"
        return failure(SPEED, found, todo)
    figures = {
        "write_s": write_s,
        "read_s": read_s,
        "bytes": size,
        "small_file_s": each_s,
        "list_s": listing_s,
    }
    if size / write_s < SLOW_BYTES_PER_S or each_s > SLOW_FILE_S:
        todo = f"{ELSEWHERE}, or save less often (checkpoint.every): saving waits for it"
        return warning(SPEED, found, todo, **figures)
    return ok(SPEED, found, **figures)


def _transfer(path: Path) -> tuple[float, float]:
    """Returns the seconds to write a block until the disk has it, and to read it."""
    block = os.urandom(BLOCK_BYTES)
    start = time.monotonic()
    with path.open("wb", buffering=0) as file:
        for _ in range(BLOCKS):
            file.write(block)
        os.fsync(file.fileno())
        write_s = time.monotonic() - start
        # or the next lines would read this machine's memory
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.monotonic()
    with path.open("rb", buffering=0) as file:
        while file.read(BLOCK_BYTES):
            pass
    return write_s, time.monotonic() - start


def _files(own: Path) -> Finding:
    """What runs rely on: locks that hold, and files that appear whole."""
    start = time.monotonic()
    write_canary(own, "here")
    durable_s = time.monotonic() - start
    if not finds_canary(own, "here", SEEN_WITHIN_S):
        return failure(FILES, f"a file that was renamed is not there after {SEEN_WITHIN_S:g} s", ELSEWHERE)
    if problem := _lock_problem(own / "lock"):
        todo = f"have it mounted with locks (NFS without nolock, Lustre with flock), or {ELSEWHERE}"
        return failure(FILES, f"a lock (flock) {problem}: two commands could write into one run", todo)
    found = f"locks hold; a renamed file is seen; {durable_s * 1000:.3g} ms until the disk has a small file"
    if durable_s > SLOW_FILE_S:
        return warning(FILES, found, f"{ELSEWHERE}: each step writes several", durable_s=durable_s)
    return ok(FILES, found, durable_s=durable_s)


def _lock_problem(path: Path) -> str:
    with path.open("wb") as first, path.open("wb") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return f"is refused ({error.strerror})"
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return ""
    return "does not hold"


def write_canary(directory: Path, name: str) -> None:
    """Writes the file that belongs to `name`, a node's for example; it is durable on return."""
    write_atomically(directory / f"canary-{name}", f"{name}\n")


def finds_canary(directory: Path, name: str, within_s: float) -> bool:
    """Returns whether the file of `name` is seen, whole, within the limit."""
    path, end = directory / f"canary-{name}", time.monotonic() + within_s
    # a listing, unlike a look for the one name, does not have a network file system remember that it was absent
    while path not in directory.iterdir() or path.read_text() != f"{name}\n":
        if time.monotonic() > end:
            return False
        time.sleep(POLL_S)
    return True
