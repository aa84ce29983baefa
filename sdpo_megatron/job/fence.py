"""Of two attempts of one job only the newer one works: where a node was cut off and comes back, or Slurm has taken it
for lost, what still runs there ends by itself. `job/begun` says how many attempts have begun."""

import os
import sys
import threading
import time
from pathlib import Path

from sdpo_megatron.errors import EXIT_PEER_LOST, RunFailed
from sdpo_megatron.launch.processes import wait_until
from sdpo_megatron.run_dir.directory import RunDirectory, lock_owner
from sdpo_megatron.terminal import tell

LOOK_S = 5.0
LEAVES_WITHIN_S = 60.0
"""How long what is left of an earlier attempt may take to see that: a shared file system shows news late."""


class Superseded(RunFailed):
    """Another attempt has begun; this one has nothing more to say."""


def is_superseded(begun: Path, number: int) -> bool:
    """Returns whether an attempt behind that with `number`, counted from 0, has begun. Who cannot read that goes on."""
    try:
        return int(begun.read_text()) > number + 1
    except (OSError, ValueError):
        return False


def end_with_attempt(begun: Path, number: int) -> None:
    """Has this process end as soon as another attempt has begun."""

    def look() -> None:
        while not is_superseded(begun, number):
            time.sleep(LOOK_S)
        tell(f"stopped: another attempt than {number} of this job has begun.", sys.stderr)
        os._exit(EXIT_PEER_LOST)

    threading.Thread(target=look, name="fence", daemon=True).start()


def wait_for_earlier(run: RunDirectory) -> None:
    """Returns once nobody uses the run directory. Raises RunFailed where somebody goes on using it."""
    if wait_until(lambda: lock_owner(run) is None, LEAVES_WITHIN_S):
        return
    raise RunFailed(
        f"{run.path} is in use by another process for {LEAVES_WITHIN_S:g} s, of an earlier attempt or of a run that "
        "was started by hand: end it."
    )
