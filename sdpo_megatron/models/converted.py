"""Directories in the user's cache that hold a model in Hugging Face's format, converted once from another one."""

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import platformdirs
from safetensors import SafetensorError

from sdpo_megatron.errors import UserError
from sdpo_megatron.files import follow_umask, sync_directory, write_atomically

CONTENTS = "converted.json"
"""The name of the file that says what else is in such a directory, by size."""
ENDING = ".converting"
OLD_S = 2 * 86_400.0
"""No conversion takes so long."""
CONVERTER = 1
"""Part of a directory's name: raise it when a conversion changes what it writes."""


def converted_once(
    name: str, what: str, convert: Callable[[Path], None], cache: Path | None, announce: Callable[[str], None]
) -> Path:
    """Returns the directory `name` in `cache`, by default the user's, filled by `convert` where it is not there with
    every file that was converted into it, each in full length; `announce` is told so in one line, as a conversion of
    `what`.

    It is safe when several processes convert at once: the first that is done is taken. Raises UserError where the
    directory cannot be written."""
    cache = cache or platformdirs.user_cache_path("sdpo_megatron") / "models"
    directory = cache / f"{name}-v{CONVERTER}"
    if is_converted(directory):
        return directory
    announce(f"Converting {what} (once): {directory}")
    try:
        with unfinished(directory) as temporary:
            convert(temporary)
            seal(temporary)
            _publish(temporary, directory)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"The model cannot be converted into {cache} ({reason}); free space there, or give another cache directory "
            "as XDG_CACHE_HOME."
        ) from None
    return directory


def is_converted(directory: Path) -> bool:
    try:
        sizes = json.loads((directory / CONTENTS).read_text(encoding="utf-8"))
        return all((directory / name).stat().st_size == size for name, size in sizes.items())
    except (FileNotFoundError, NotADirectoryError, ValueError, AttributeError, TypeError):
        return False


@contextlib.contextmanager
def unfinished(directory: Path) -> Iterator[Path]:
    """Yields a new directory beside `directory`, with a name that begins with a dot, to be renamed when it is whole: on
    leaving, it is removed if it is still there. What a killed process left beside `directory` is removed first; of
    another machine when it is old, since on a network's file system nothing tells whether it still works there."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    for leftover in directory.parent.glob(f".*{ENDING}"):
        _remove_unless_used(leftover)
    temporary, lock = _locked(directory)
    try:
        yield temporary
    finally:
        # gone already when published
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def _locked(directory: Path) -> tuple[Path, int]:
    """Returns a new directory beside `directory`, and its lock, which is held while this process lives: the next one
    knows what was left behind."""
    while True:
        temporary = directory.with_name(
            f".{directory.name}.{secrets.token_hex(8)}.{socket.gethostname()}{ENDING}"
        )
        temporary.mkdir()
        # until it is locked, another process takes it for a leftover
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(temporary, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if temporary.is_dir():
                return temporary, lock
            os.close(lock)


def _remove_unless_used(leftover: Path) -> None:
    """Removes what a conversion that was killed has left."""
    # another process was faster, or works in it, or it is another user's
    with contextlib.suppress(FileNotFoundError, BlockingIOError, PermissionError):
        is_ours = leftover.name.endswith(f".{socket.gethostname()}{ENDING}")
        if not is_ours and time.time() - leftover.stat().st_mtime < OLD_S:
            return
        descriptor = os.open(leftover, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(leftover, ignore_errors=True)
        finally:
            os.close(descriptor)


def seal(temporary: Path) -> None:
    """Has the disk hold the directory's files, and names them with their sizes in CONTENTS, the last one written."""
    sizes = {}
    for file in sorted(temporary.iterdir()):
        # of a conversion that this one took its files from
        if file.name == CONTENTS:
            continue
        # safetensors makes its file private
        follow_umask(file)
        sizes[file.name] = file.stat().st_size
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    write_atomically(temporary / CONTENTS, json.dumps(sizes))


def _publish(temporary: Path, directory: Path) -> None:
    """Rename the finished `temporary` to `directory`, or leave it if another process was first."""
    if directory.is_dir() and not is_converted(directory):
        lost_a_file = directory.with_name(f".{directory.name}.{secrets.token_hex(8)}{ENDING}")
        directory.rename(lost_a_file)
        shutil.rmtree(lost_a_file, ignore_errors=True)
    try:
        temporary.rename(directory)
    except OSError:
        if not directory.is_dir():
            raise
    sync_directory(directory.parent)
