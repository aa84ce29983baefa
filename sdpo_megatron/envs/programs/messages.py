"""What the processes inside the sandbox say to each other: JSON behind its length, and Python's values in it.

With harness.py and nursery.py this runs inside the sandbox, on its Python: the standard library only.
"""

import json
import os
import select
import struct
import time
from collections.abc import Callable
from typing import Any

LONGEST_BYTES = 1 << 30
HEAD = struct.Struct("!I")
DEEPEST = 100
LARGE_BITS = 62
"""Whole numbers beyond are written in hexadecimal: of decimal digits Python reads some thousands only."""


class Ended(Exception):
    """The other end of a pipe is gone, or says what is no message."""


class TimeUp(BaseException):
    """Not an Exception, so that a test that catches those does not catch it."""


class Pipe:
    """Messages one way."""

    def __init__(self) -> None:
        self.read_fd, self.write_fd = os.pipe()

    def send(self, message: Any) -> None:
        data = json.dumps(message).encode()
        write_all(self.write_fd, HEAD.pack(len(data)) + data)

    def receive(self, most_bytes: int = LONGEST_BYTES, deadline: float | None = None) -> Any:
        """Returns the next message. Raises TimeUp, and Ended where there is none."""
        size = HEAD.unpack(self._read(HEAD.size, deadline))[0]
        if size > most_bytes:
            raise Ended(f"a message of {size} bytes")
        try:
            return json.loads(self._read(size, deadline))
        except (ValueError, RecursionError) as error:
            raise Ended("no message") from error

    def _read(self, size: int, deadline: float | None) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            if deadline is not None:
                left_s = deadline - time.monotonic()
                if left_s <= 0 or not select.select([self.read_fd], [], [], left_s)[0]:
                    raise TimeUp
            chunk = os.read(self.read_fd, size - len(parts))
            if not chunk:
                raise Ended("the other end is closed")
            parts += chunk
        return bytes(parts)


def write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


class Kept:
    """A value not made of plain ones, left in the program's process: it can be handed back, and equals nothing."""

    def __init__(self, place: int, kind: str):
        self.place_in_program, self.kind = place, kind

    def __repr__(self) -> str:
        return f"<{self.kind} object>"


def encoded(value: Any, kept: list[Any], depth: int = 0) -> Any:
    """Returns a value as JSON: what JSON does not have is an object with its kind, and what is not made of plain values
    stays in `kept`, its place taken."""
    if depth > DEEPEST:
        raise ValueError(f"a value of more than {DEEPEST} levels")

    def each(items: Any) -> list[Any]:
        return [encoded(item, kept, depth + 1) for item in items]

    if value is None or isinstance(value, (bool, float)):
        return value
    if isinstance(value, int):
        return {"int": hex(value)} if abs(value) >> LARGE_BITS else int(value)
    if isinstance(value, str):
        return "".join(value)
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, dict):
        return {"dict": [each(pair) for pair in value.items()]}
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: each(value)}
    if isinstance(value, (list, range, type({}.keys()), type({}.values()), type({}.items()))) or hasattr(
        value, "__next__"
    ):
        return each(value)
    place = getattr(value, "place_in_program", None)
    if place is None:
        kept.append(value)
        place = len(kept) - 1
    return {"kept": place, "type": type(value).__name__}


def decoded(value: Any, kept_of: Callable[[int, str], Any]) -> Any:
    """Returns the value of what `encoded` made; `kept_of` says what stands for the one of that place and type."""
    if isinstance(value, list):
        return [decoded(item, kept_of) for item in value]
    if not isinstance(value, dict):
        return value
    if "kept" in value:
        return kept_of(value["kept"], value["type"])
    ((kind, content),) = value.items()
    if kind == "int":
        return int(content, 16)
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "complex":
        return complex(*content)
    if kind == "dict":
        return {decoded(key, kept_of): decoded(item, kept_of) for key, item in content}
    return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](
        decoded(item, kept_of) for item in content
    )
