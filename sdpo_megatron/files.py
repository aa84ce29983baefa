"""Files that a crash leaves whole, with the old content or the new one; and where tools can write."""

import argparse
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, text: str, durable: bool = True) -> None:
    """Replace `path` by `text` (UTF-8) in one step; see `opened_atomically`."""
    with opened_atomically(path, durable) as file:
        file.write(text.encode())


@contextmanager
def opened_atomically(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """Replaces `path` on leaving, in one step, by what was written meanwhile; an exception leaves it as it was. Its
    directory must exist.

    `durable` also waits until the disk has it; without it the file is whole after the death of a process, but
    not necessarily after the death of the machine.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if durable:
        sync_directory(path.parent)


def output_file(text: str) -> Path:
    """Serves as argparse's `type` for a file that will be written later, and refuses one that cannot be. Nothing is
    made or changed now."""
    path = Path(text)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written; name a file in a directory that exists")
    return path


def sync_directory(directory: Path) -> None:
    """Make the names in `directory` durable: without it a renamed file may be lost with the machine."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
