"""Threads for work that others should not wait for."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

Result = TypeVar("Result")


class BackgroundThread:
    """Does one thing at a time, or as many as it may have threads, in the order in which it is asked, whoever asks."""

    def __init__(self, name: str, threads: int = 1):
        self._name = name
        self._most = threads
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()

    def run(self, work: Callable[[], Result], result: "Future[Result]") -> None:
        """Has `result` get what `work` returns or raises. Safe from any thread, and returns at once."""
        self._tasks.put((result, work))
        with self._lock:
            if len(self._threads) < self._most:
                # an executor's threads would be waited for at the end of the process
                thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._threads.append(thread)
                thread.start()

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
