"""A file that one process, or one node, writes and another looks for."""

import time
from pathlib import Path

from sdpo_megatron.files import write_atomically

POLL_S = 0.05


def write_canary(directory: Path, name: str) -> None:
    """Writes the file that belongs to `name`, a node's for example; it is durable on return."""
    write_atomically(_path(directory, name), f"{name}\n")


def find_canary(directory: Path, name: str, within_s: float) -> float | None:
    """Returns after how many seconds the file of `name` is seen, whole; None where it is not within the limit."""
    start = time.monotonic()
    while True:
        # a listing, unlike a look for the one name, does not have a network file system remember that it was absent
        if (
            _path(directory, name) in directory.iterdir()
            and _path(directory, name).read_text() == f"{name}\n"
        ):
            return time.monotonic() - start
        if time.monotonic() - start > within_s:
            return None
        time.sleep(POLL_S)


def _path(directory: Path, name: str) -> Path:
    return directory / f"canary-{name}"
