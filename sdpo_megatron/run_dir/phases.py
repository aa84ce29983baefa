"""The phase file of a rank: what it does, in which step, since when. People read it, and tests that kill by phase."""

import json
import threading
import time
from pathlib import Path
from typing import Any

from sdpo_megatron.files import write_atomically


class PhaseFile:
    """A JSON object {"rank", "step", "phase", "since"}, `since` in seconds since 1970. A thread writes the newest phase
    at most every `every_s` seconds, so that short phases cost a shared file system nothing and one that lasts shows."""

    def __init__(self, path: Path, rank: int, every_s: float) -> None:
        """`path` lies in `RunDirectory.phases`, which must exist. With `every_s` 0 each phase is written at once."""
        self._path, self._rank, self._every_s = path, rank, every_s
        self._newest: dict[str, Any] | None = None
        self._failure: OSError | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep_writing, name="phase file", daemon=True)
        if every_s:
            self._thread.start()

    def enter(self, step: int, phase: str) -> None:
        """Notes what the rank does now. Raises OSError where the file could not be written since the last call."""
        self._newest = {"rank": self._rank, "step": step, "phase": phase, "since": time.time()}
        if not self._every_s:
            self._write(self._newest)
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Writes the last phase and ends the thread."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _keep_writing(self) -> None:
        written = None
        closing = False
        while not closing:
            closing = self._closed.wait(self._every_s)
            newest = self._newest
            if newest is not None and newest is not written:
                try:
                    self._write(newest)
                except OSError as error:
                    self._failure = error
                    return
                written = newest

    def _write(self, phase: dict[str, Any]) -> None:
        write_atomically(self._path, json.dumps(phase) + "\n", durable=False)
