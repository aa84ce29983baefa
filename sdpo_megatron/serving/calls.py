"""Calls to servers that are waited for together, and no longer than the run wants to go on."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import Any

from sdpo_megatron.stopping import Stopped, StopRequest

POLL_S = 0.1
STOP_GRACE_S = 5.0
"""How long a call may still take once the run is asked to stop: a server that is well answers by then."""


class Calls:
    """Runs calls in threads of their own. `abandoned` says whether one of them was left behind: a transfer that hangs
    cannot be ended, and only the end of the process ends its thread."""

    def __init__(self, stop: StopRequest):
        self.stop = stop
        self.abandoned = False

    def start(self, work: Callable[..., Any], *arguments: Any, **options: Any) -> Future:
        """Begins `work`(...) and returns its future."""
        future: Future = Future()

        def run() -> None:
            try:
                future.set_result(work(*arguments, **options))
            # whatever it is, it is raised where the future is waited for
            except BaseException as error:
                future.set_exception(error)

        # an executor's threads would be waited for at the end of the process
        threading.Thread(target=run, daemon=True).start()
        return future

    def all(self, futures: Sequence[Future]) -> list[Any]:
        """Returns the results, in order. Raises the first failure without waiting for the others, and Stopped where the
        run is asked to stop and they take long."""
        left_s = STOP_GRACE_S
        while True:
            done, running = wait(futures, timeout=POLL_S, return_when=FIRST_EXCEPTION)
            failed = [future for future in futures if future in done and future.exception() is not None]
            if failed or not running:
                self.abandoned |= bool(running)
                return [future.result() for future in failed or futures]
            if self.stop.requested:
                left_s -= POLL_S
                if left_s < 0:
                    self.abandoned = True
                    raise Stopped

    def one(self, work: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Returns the result of `work`(...)."""
        (result,) = self.all([self.start(work, *arguments, **options)])
        return result
