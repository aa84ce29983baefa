"""Peak memory of all processes of a run, sampled."""

import contextlib
import threading

import psutil


class PeakMemory:
    """Samples the resident memory of a process and its descendants twice a second in a thread.

    Pages that processes share (libraries) count once for each, so this is an upper bound of what the run
    needs.
    """

    def __init__(self, root: int, interval_s: float = 0.5) -> None:
        """`root` is a process id."""
        self._root = psutil.Process(root)
        self._interval_s = interval_s
        self._peak = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)
        self._thread.start()

    def take(self) -> int:
        """Returns the peak since the last call, in bytes."""
        now = self._now()
        with self._lock:
            peak, self._peak = max(self._peak, now), 0
        return peak

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_s):
            now = self._now()
            with self._lock:
                self._peak = max(self._peak, now)

    def _now(self) -> int:
        total = 0
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [self._root, *self._root.children(recursive=True)]:
                # it may end between the listing and here
                with contextlib.suppress(psutil.NoSuchProcess):
                    total += process.memory_info().rss
        return total
