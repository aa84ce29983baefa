"""Lines for the person who watches; nobody need be there. Whoever reads may leave (`| head -1`), and the disk that
output goes to may be full: then what is said is lost, and the run goes on."""

import contextlib
import io
import os
import sys
from typing import Any, TextIO

from rich.console import Console


def tell(text: str, stream: TextIO | None = None) -> None:
    """Prints to `stream`, by default standard output."""
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except OSError:
        silence(stream)


def escape_what_cannot_be_shown() -> None:
    """Has standard output and error show the escape of a character that the locale does not have."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def silence(stream: Any) -> None:
    """Has what is written to `stream` from now on go nowhere, what its buffer holds included."""
    # no file is behind it
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class Screen(Console):
    """rich's console, on standard output."""

    def __init__(self) -> None:
        super().__init__(highlight=False, soft_wrap=True)

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except OSError:
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """Goes on without output, where rich would end the process."""
        self.quiet = True
        silence(self.file)
