"""One cluster at a time on a machine: a file that the cluster's control machine keeps locked as long as it lives."""

import fcntl
import json
import os
import time
from pathlib import Path

LOCK = Path("/run/sdpo_megatron-test-cluster")
"""Says where the cluster's root is and which process it ends with, if any."""


class LockedError(Exception):
    """There is a cluster already."""


def take_lock(root: Path, owner: int | None, wait_s: float) -> int:
    """Returns the open and locked file, once no cluster is up.

    Raises:
        LockedError: one still is after `wait_s`; says whose.
    """
    lock = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    end = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > end:
                os.close(lock)
                raise LockedError(_whose()) from None
            time.sleep(0.2)
    os.truncate(lock, 0)
    os.pwrite(lock, json.dumps({"root": str(root), "owner": owner}).encode(), 0)
    return lock


def last_root() -> Path | None:
    """Where the files of the cluster are, or were, that was started last."""
    text = LOCK.read_text() if LOCK.exists() else ""
    return Path(json.loads(text)["root"]) if text else None


def _whose() -> str:
    said = json.loads(LOCK.read_text())
    remedy = "end it with python -m tests.slurm.cluster down"
    if said["owner"]:
        remedy = f"it ends with the tests of process {said['owner']}"
    return f"a cluster is up already, in {said['root']}: {remedy}"
