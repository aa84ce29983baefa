"""A file that one process, or one node, writes and another looks for."""

import time
from pathlib import Path

from sdpo_megatron.files import write_atomically

POLL_S = 0.05


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
