"""A child process that is read from, bounded in what it says and how long it takes, and surely ended."""

import os
import selectors
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sdpo_megatron.envs.sandbox.base import SandboxFault

CHUNK_BYTES = 1 << 16
REPORT_BYTES = 1 << 16
"""A sandbox's own report is short; more is a fault."""
GONE_WITHIN_S = 10.0
"""Seconds that the kernel may take to end what was killed."""


@dataclass(frozen=True)
class Watched:
    """What came of a child. `ended_for` is the bound that it passed, if it did."""

    report_bytes: bytes
    stdout_bytes: bytes
    stderr_bytes: bytes
    ended_for: Literal["wall", "output"] | None
    wall_s: float


class _Pipe:
    """One stream of a child, kept up to a bound and then read and thrown away."""

    def __init__(self, fd: int, most_bytes: int):
        self.fd, self.most_bytes = fd, most_bytes
        self.kept = bytearray()
        self.full = False

    def read(self) -> bool:
        """Reads once; returns whether more may come."""
        data = os.read(self.fd, CHUNK_BYTES)
        room = self.most_bytes - len(self.kept)
        self.kept += data[:room]
        self.full |= len(data) > room
        return bool(data)


def watch(
    command: Sequence[str],
    *,
    stdin_fd: int,
    pass_fds: Sequence[int],
    report_fds: tuple[int, int],
    wall_s: float,
    output_bytes: int,
) -> Watched:
    """Runs `command`, without environment, until its streams are closed, which is when its last process is gone.

    The command must end all of its descendants when it is killed itself. `report_fds` are the ends of a pipe on which
    it reports to us; `watch` closes both. Raises SandboxFault where the command does not start or does not go.
    """
    began = time.monotonic()
    report_fd, write_fd = report_fds
    try:
        try:
            child = subprocess.Popen(
                command,
                stdin=stdin_fd,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[*pass_fds, write_fd],
                env={},
                cwd="/",
            )
        except OSError as error:
            raise SandboxFault(f"{command[0]} does not start: {error}") from error
        finally:
            os.close(write_fd)
        assert child.stdout is not None and child.stderr is not None
        report = _Pipe(report_fd, REPORT_BYTES)
        streams = [_Pipe(child.stdout.fileno(), output_bytes), _Pipe(child.stderr.fileno(), output_bytes)]
        with child:  # closes its pipes
            try:
                ended_for = _read_all(child, report, streams, began + wall_s)
            finally:
                child.kill()
        stdout, stderr = (bytes(stream.kept) for stream in streams)
        return Watched(bytes(report.kept), stdout, stderr, ended_for, time.monotonic() - began)
    finally:
        os.close(report_fd)


def _read_all(
    child: "subprocess.Popen[bytes]", report: _Pipe, streams: list[_Pipe], deadline: float
) -> Literal["wall", "output"] | None:
    """Reads until all streams end, and kills the child where it passes a bound; returns which."""
    ended_for: Literal["wall", "output"] | None = None
    with selectors.DefaultSelector() as selector:
        for pipe in (report, *streams):
            selector.register(pipe.fd, selectors.EVENT_READ, pipe)
        while selector.get_map():
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                if ended_for is not None:
                    raise SandboxFault(f"processes live on {GONE_WITHIN_S:.0f} s after they were killed")
                ended_for = "wall"
            elif ended_for is None and any(stream.full for stream in streams):
                ended_for = "output"
            else:
                for key, _ in selector.select(left_s):
                    if not key.data.read():
                        selector.unregister(key.fd)
                continue
            child.kill()
            deadline = time.monotonic() + GONE_WITHIN_S
    return ended_for
