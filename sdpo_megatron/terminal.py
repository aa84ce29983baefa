"""Lines for the person who watches; nobody need be there. Whoever reads may leave (`| head -1`), and the disk that
output goes to may be full: then what is said is lost, and the run goes on."""

import contextlib
import io
import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from sdpo_megatron.errors import EXIT_FAILED, EXIT_USER_ERROR, RunFailed, ServerLost, UserError
from sdpo_megatron.stopping import stop_signals


def tell(text: str, stream: TextIO | None = None) -> None:
    """Prints to `stream`, by default standard output."""
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except OSError:
        silence(stream)


def reported(work: Callable[[], int]) -> int:
    """Returns the exit code of `work`, a command; where it raises UserError, RunFailed or ServerLost, says that in one
    line on standard error and returns theirs; so for a file that the system does not let it use."""
    try:
        return work()
    except (UserError, RunFailed, ServerLost) as error:
        tell(f"error: {error}", sys.stderr)
        return EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAILED
    # a full or broken disk is no mistake
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        if error.filename is None:
            raise
        tell(
            f"error: {error.filename} cannot be used: {error.strerror}; correct the path, or its permissions.",
            sys.stderr,
        )
        return EXIT_USER_ERROR


def interruptible(work: Callable[[], int]) -> int:
    """Returns the exit code of `work`, all that this process does, as `reported` does. A signal that asks to stop ends
    it at once, with 128 + signal, but not before it has put away what it made."""
    escape_what_cannot_be_shown()
    for number in stop_signals():
        # Ctrl-C is KeyboardInterrupt already
        if number != signal.SIGINT:
            signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        return reported(work)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def script(path: str, *arguments: str | Path) -> str:
    """Returns how a script of the project is called, to be copied into a shell: by this interpreter."""
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    return shlex.join([str(python), path, *map(str, arguments)])


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
