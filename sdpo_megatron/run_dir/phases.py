"""The phase file of a rank: what it does, in which step, since when. Read by tests that kill by phase and by
people."""

import json
import time
from pathlib import Path
from typing import TypedDict

from sdpo_megatron.files import write_atomically


class Phase(TypedDict):
    rank: int
    step: int
    phase: str
    since: float
    """Seconds since 1970."""


class PhaseFile:
    """Written on entry to each phase; cheap (no fsync)."""

    def __init__(self, path: Path, rank: int) -> None:
        """`path` lies in `RunDirectory.phases`, which must exist."""
        self._path = path
        self._rank = rank

    def enter(self, step: int, phase: str) -> None:
        now = Phase(rank=self._rank, step=step, phase=phase, since=time.time())
        write_atomically(self._path, json.dumps(now) + "\n", durable=False)


def read_phase(path: Path) -> Phase | None:
    """What the rank entered last; None before its first phase."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
