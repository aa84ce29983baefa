"""The phase file of a rank: what it does, in which step, since when. People read it, and tests that kill by phase."""

import json
import time
from pathlib import Path

from sdpo_megatron.files import write_atomically


class PhaseFile:
    """A JSON object {"rank", "step", "phase", "since"}, `since` in seconds since 1970. It is written on entry to each
    phase, which is cheap (no fsync)."""

    def __init__(self, path: Path, rank: int) -> None:
        """`path` lies in `RunDirectory.phases`, which must exist."""
        self._path = path
        self._rank = rank

    def enter(self, step: int, phase: str) -> None:
        now = {"rank": self._rank, "step": step, "phase": phase, "since": time.time()}
        write_atomically(self._path, json.dumps(now) + "\n", durable=False)
