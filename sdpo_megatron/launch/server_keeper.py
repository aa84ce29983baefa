"""Keeps the launcher's server up."""

from collections.abc import Callable

from sdpo_megatron.errors import RunFailed, UserError
from sdpo_megatron.launch.processes import Guard, is_stopped, wait_until
from sdpo_megatron.launch.server import ServerProcess
from sdpo_megatron.run_dir.server_files import ServerFiles, ServerRecord

ENDS_TOGETHER_S = 1.0
"""The time in which a signal reaches us too that has ended the server, and in which a server ends whose connections
have broken."""


class ServerKeeper:
    """Starts the server, and starts it again when it ended or rank 0 asks for that."""

    def __init__(
        self,
        server: ServerProcess,
        files: ServerFiles,
        guard: Guard,
        max_restarts: int,
        *,
        stopping: Callable[[], bool],
        say: Callable[[str], None],
    ) -> None:
        """`stopping`: whether the run was asked to stop, which then needs no server any more."""
        self._server, self._files, self._guard = server, files, guard
        self._max_restarts = max_restarts
        self._stopping, self._say = stopping, say
        self._starts = 0
        self._failed_starts = 0
        self._starting = False

    def start(self) -> None:
        self._server.start(self._guard)
        self._starts += 1
        self._starting = True
        assert self._server.pid is not None
        if self._starts == 1:
            self._files.give_key(0, self._server.api_key)
        self._files.write(0, ServerRecord(url=self._server.url, pid=self._server.pid, starts=self._starts))

    def tend(self) -> None:
        """Starts the server again where that is needed. Must be called often. Raises RunFailed if it does not come up.

        How often it may be lost once it is up is for rank 0 to decide, which knows what it did in between."""
        if self._files.take_request(0) == self._starts:
            why = "does not answer"
            if wait_until(lambda: not self._server.alive(), ENDS_TOGETHER_S):
                why = "ended"
            elif self._server.pid is not None and is_stopped(self._server.pid):
                why = "is stopped, by SIGSTOP or a debugger"
            self._restart(why)
        elif self._starting:
            self._check_start()
        elif not self._server.alive():
            self._restart("ended")

    def end(self) -> None:
        """Stops the server for good."""
        self._server.stop()
        self._files.remove_key(0)

    def _check_start(self) -> None:
        try:
            if self._server.came_up():
                self._starting, self._failed_starts = False, 0
        except UserError as error:
            if wait_until(self._stopping, ENDS_TOGETHER_S):
                return
            self._failed_starts += 1
            if self._starts == 1 or self._failed_starts > self._max_restarts:
                raise RunFailed(error.message, error.log_end) from None
            self._restart("did not come up again")

    def _restart(self, what: str) -> None:
        if wait_until(self._stopping, ENDS_TOGETHER_S):
            return
        self._say(f"The server at {self._server.url} {what}; starting it again.")
        self._server.stop()
        self.start()
