"""The one boundary between what a user gives and what reads it: settings, model directory, chat template, problems,
run directory. What nobody foresaw ends there in one line that says what was read, and its traceback in a file."""

import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from sdpo_megatron.errors import ReportedError, UserError, one_line

ANNOUNCED_EVERY_S = 4.0
LONGEST_REASON = 200
"""Characters that a line repeats of what an exception says."""


class _TookTooLong(BaseException):
    """Its own base: code that is read within a limit may catch every Exception."""


@contextmanager
def reading(
    what: str, limit_s: float | None = None, announce: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Turns whatever is raised inside, but for errors that have their own line, into a UserError that names
    `what`, the file or setting that is read. Whatever takes longer than `limit_s` seconds is ended likewise, as far as
    Python runs it in the main thread. `announce` is told in a line, again and again, what takes long."""
    try:
        with _limited(limit_s), _announced(what, announce):
            yield
    except ReportedError:
        raise
    except UnicodeEncodeError as error:
        raise UserError(
            f"A path holds {error.object[error.start]!r}, which this locale ({error.encoding}) cannot write; set "
            "LC_ALL=C.UTF-8, or name another."
        ) from None
    except _TookTooLong:
        raise UserError(
            f"Reading {what} takes more than {limit_s:g} s; correct that, or make it smaller."
        ) from None
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise UserError(
                f"{error.filename} cannot be used: {error.strerror}; correct that, or name another."
            ) from None
        raise UserError(f"Reading {what} failed ({reason(error)}); correct that{_kept_in(error)}.") from None


def reason(error: BaseException) -> str:
    """Returns kind and first line of an exception, and the second where that one leads to it, cut to LONGEST_REASON
    characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    shown = lines[: 2 if lines and lines[0].endswith(":") else 1]
    said = one_line(": ".join(filter(None, (type(error).__name__, " ".join(shown)))))
    return said if len(said) <= LONGEST_REASON else f"{said[: LONGEST_REASON - 3]}..."


def _kept_in(error: Exception) -> str:
    """Writes the traceback to a file of its own, and returns the words that name it."""
    try:
        descriptor, name = tempfile.mkstemp(prefix="sdpo_megatron-", suffix=".traceback")
        with open(descriptor, "w", encoding="utf-8", errors="replace") as file:
            file.writelines(traceback.format_exception(error))
    # the line itself matters more
    except OSError:
        return ""
    return f". Its traceback is in {name}"


@contextmanager
def _announced(what: str, announce: Callable[[str], None] | None) -> Iterator[None]:
    if announce is None:
        yield
        return
    done, began = threading.Event(), time.monotonic()

    def watch() -> None:
        while not done.wait(ANNOUNCED_EVERY_S):
            announce(f"Still reading {what}, for {time.monotonic() - began:.0f} s now")

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


@contextmanager
def _limited(seconds: float | None) -> Iterator[None]:
    """Raises _TookTooLong inside after that many seconds. One limit within another is the inner one's alone."""
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise _TookTooLong

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
