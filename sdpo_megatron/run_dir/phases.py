"""What a rank says of itself in files of the run directory, which people read, what watches for hangs, and the
launcher: its phase (what it does, in which step, since when), what its threads were at each time somebody asked by
SIGUSR1, and just before it exits why it ends."""

import faulthandler
import json
import signal
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypedDict

from sdpo_megatron.files import write_atomically

START = "start"
"""The phase before the first step: models are loaded, servers met."""
STACKS_ASKED_BY = signal.SIGUSR1


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What a rank does now; times in seconds since 1970."""

    rank: int
    step: int | None
    """None before the first step is known."""
    phase: str
    since: float
    progress: float
    """When it last got on: it began, a micro-batch was done, or rank 0 saw to what it waits for within a limit."""
    longest_s: float | None
    """The longest that this phase took so far, since the process began; None for its first time."""


class PhaseFile:
    """A JSON object with the fields of Phase. A thread writes the newest phase at most every `every_s` seconds, so that
    short phases cost a shared file system nothing and one that lasts shows."""

    def __init__(self, path: Path, rank: int, every_s: float) -> None:
        """`path` lies in `RunDirectory.phases`, which must exist from the first phase on. With `every_s` 0 each phase
        is written at once."""
        self._path, self._rank, self._every_s = path, rank, every_s
        self._newest: Phase | None = None
        self._longest: dict[str, float] = {}
        self._failure: OSError | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep_writing, name="phase file", daemon=True)
        if every_s:
            self._thread.start()

    def enter(self, step: int | None, phase: str) -> None:
        """Notes what the rank does now. Raises OSError where the file could not be written since the last call."""
        now, before = time.time(), self._newest
        if before is not None:
            self._longest[before.phase] = max(self._longest.get(before.phase, 0.0), now - before.since)
        longest = self._longest.get(phase)
        self._note(Phase(rank=self._rank, step=step, phase=phase, since=now, progress=now, longest_s=longest))
        if self._failure is not None:
            raise self._failure

    def progress(self) -> None:
        """Notes that the rank gets on. Must be called in the thread that calls `enter`."""
        if self._newest is not None:
            self._note(replace(self._newest, progress=time.time()))

    def close(self) -> None:
        """Writes the last phase and ends the thread."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _note(self, phase: Phase) -> None:
        self._newest = phase
        if not self._every_s:
            self._write(phase)

    def _keep_writing(self) -> None:
        written = None
        closing = False
        try:
            while not closing:
                closing = self._closed.wait(self._every_s)
                newest = self._newest
                if newest is not None and newest is not written:
                    self._write(newest)
                    written = newest
        except OSError as error:
            self._failure = error

    def _write(self, phase: Phase) -> None:
        write_atomically(self._path, json.dumps(asdict(phase)) + "\n", durable=False)


def read_phase(path: Path) -> Phase | None:
    """Returns what the phase file `path` says, None where there is none yet, or it cannot be read now."""
    try:
        return Phase(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_stacks_when_asked(path: Path) -> None:
    """Has SIGUSR1 add the Python stacks of all threads to the file `path`, also while a call into C does not return."""
    # for as long as the process lives
    file = path.open("w", encoding="utf-8")
    faulthandler.register(STACKS_ASKED_BY, file=file, all_threads=True)


class StatedEnding(TypedDict):
    exit_code: int
    """The code with which the rank is about to exit."""
    message: str
    """The message as it stands in the rank's log: one line, and perhaps the end of another log below."""


def write_ending(path: Path, exit_code: int, message: str) -> None:
    """Writes `path`, of `RunDirectory.ending`, in one step. Raises OSError where the disk does not take it."""
    write_atomically(path, json.dumps(StatedEnding(exit_code=exit_code, message=message)) + "\n")


def read_ending(path: Path) -> StatedEnding | None:
    """Returns what the rank stated; None where it did not."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
