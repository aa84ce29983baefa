"""Messages between the run and its graders, over a pair of Unix sockets that nobody else can reach."""

import socket
import struct
from dataclasses import dataclass

from sdpo_megatron.records import Grade

_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of one grading; one of the three is there."""

    grade: Grade | None = None
    fault: str = ""
    """The infrastructure failed; to be tried again."""
    raised: str = ""
    """The environment itself is wrong; trying again would not help."""


def send(to: socket.socket, message: bytes) -> None:
    """Raises OSError where the other end is gone."""
    to.sendall(_LENGTH.pack(len(message)) + message)


def receive(source: socket.socket) -> bytes:
    """Returns the next message, which is not empty; empty bytes where the other end was closed. Raises TimeoutError
    where the socket has a timeout in which nothing comes."""
    head = _exactly(source, _LENGTH.size)
    return _exactly(source, _LENGTH.unpack(head)[0]) if head else b""


def _exactly(source: socket.socket, size: int) -> bytes:
    parts, missing = [], size
    while missing:
        part = source.recv(min(missing, 1 << 20))
        if not part:
            return b""
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)
