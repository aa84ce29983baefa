"""What is written beside training: by one thread, in order, with one thing waiting at most."""

import contextlib
import queue
import threading
from collections.abc import Callable


class BackgroundWriter:
    """Calls what it is given in a thread of its own. What that raises never stops training: it becomes one warning for
    as long as nothing succeeds, and what comes later is tried as if nothing had happened."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        """`warn` is given what failed and why, in the thread that calls `put` or `settle`."""
        self._warn = warn
        self._waiting: queue.Queue[tuple[str, Callable[[], None]]] = queue.Queue(maxsize=1)
        self._failing = False
        self._failures: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="background writer", daemon=True).start()

    def put(self, name: str, write: Callable[[], None]) -> None:
        """Has `write` called soon. Blocks while another one waits already, so that memory stays bounded."""
        self._waiting.put((name, write))
        self._tell()

    def offer(self, name: str, write: Callable[[], None], *, quietly: bool = False) -> None:
        """Has `write` called soon, unless another one waits already, which will do as well. Never blocks. `quietly`
        leaves failures to be told by a later call: a terminal may hold up who writes to it."""
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait((name, write))
        if not quietly:
            self._tell()

    def settle(self) -> None:
        """Waits until everything that was put is written, or has failed."""
        self.wait()
        self._tell()

    def wait(self) -> None:
        """Waits likewise in another thread than the one that is warned."""
        self._waiting.join()

    def _tell(self) -> None:
        while not self._failures.empty():
            self._warn(self._failures.get())

    def _work(self) -> None:
        while True:
            name, write = self._waiting.get()
            try:
                write()
                self._failing = False
            # whatever the disk or the content brings about
            except Exception as error:
                if not self._failing:
                    reason = " ".join(str(error).split())[:200]
                    self._failures.put(f"{name} failed ({type(error).__name__}: {reason})")
                self._failing = True
            finally:
                # an idle thread keeps no step in memory
                del write
                self._waiting.task_done()
