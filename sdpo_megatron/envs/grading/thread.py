"""One thread for work that others should not wait for."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

Result = TypeVar("Result")


class BackgroundThread:
    """Does one thing at a time, in the order in which it is asked, whoever asks."""

    def __init__(self, name: str):
        self._name = name
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def run(self, work: Callable[[], Result], result: "Future[Result]") -> None:
        """Has `result` get what `work` returns or raises. Safe from any thread, and returns at once."""
        self._tasks.put((result, work))
        with self._lock:
            if self._thread is None:
                # an executor's threads would be waited for at the end of the process
                self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while True:
            result, work = self._tasks.get()
            try:
                result.set_result(work())
            # whatever it is, it is raised where the result is waited for
            except BaseException as error:
                result.set_exception(error)
            # or the thread holds them until it gets the next
            del result, work
