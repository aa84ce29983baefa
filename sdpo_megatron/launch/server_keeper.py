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
        self._group: int | None = None
        self._starting = False

    def start(self) -> None:
        self._server.start()
        self._starts += 1
        self._starting = True
        assert self._server.pid is not None
        self._group = self._server.pid
        self._guard.watch(self._group, self._server.private_directory)
        if self._starts == 1:
            self._files.give_key(0, self._server.api_key)
        self._files.write(0, ServerRecord(url=self._server.url, pid=self._group, starts=self._starts))

    def tend(self) -> None:
        """Starts the server again where that is needed. Must be called often. Raises RunFailed if it does not come up.

        How often it may be lost once it is up is for rank 0 to decide, which knows what it did in between."""
        if self._files.take_request(0) == self._starts:
            ended = wait_until(lambda: not self._server.alive(), ENDS_TOGETHER_S)
            self._restart("ended" if ended else self._why_silent())
        elif self._starting:
            self._check_start()
        elif not self._server.alive():
            self._restart("ended")

    def end(self) -> None:
        """Stops the server for good."""
        self.stop()
        self._files.remove_key(0)

    def stop(self) -> None:
        self._server.stop()
        if self._group is not None:
            self._guard.release(self._group)
            self._group = None

    def _check_start(self) -> None:
        try:
            self._starting = not self._server.came_up()
        except UserError as error:
            if wait_until(self._stopping, ENDS_TOGETHER_S):
                return
            self._failed_starts += 1
            if self._starts == 1 or self._failed_starts > self._max_restarts:
                raise RunFailed(error.message, error.log_end) from None
            self._restart("did not come up again")
            return
        if not self._starting:
            self._failed_starts = 0

    def _why_silent(self) -> str:
        stopped = self._group is not None and is_stopped(self._group)
        return "is stopped, by SIGSTOP or a debugger" if stopped else "does not answer"

    def _restart(self, what: str) -> None:
        if wait_until(self._stopping, ENDS_TOGETHER_S):
            return
        self._say(f"The server at {self._server.url} {what}; starting it again.")
        self.stop()
        self.start()
