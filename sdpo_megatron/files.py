"""Files that a crash leaves whole, with the old content or the new one; and where tools can write."""

import argparse
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from sdpo_megatron.errors import ConfigError, UserError

LFS_POINTER = b"version https://git-lfs"
SMALL_BYTES = 1_000_000
"""The most that a file of settings, or one that describes something, may have."""


def expand_user(path: str, key: str) -> Path:
    """Returns the path in which `~` and `~NAME` at the begin mean home directories; `key` is the setting that has it.

    Raises ConfigError where there is no such user, and for a variable, which only a shell would fill in."""
    if "$" in path:
        raise ConfigError(f"{key} is {path}: variables are not filled in there; write the whole path, or ~.")
    try:
        return Path(path).expanduser()
    # pathlib's way to say it
    except RuntimeError:
        user = path.split("/")[0].removeprefix("~")
        raise ConfigError(
            f"{key}: there is no user {user}, with whose home {path} begins; correct it."
        ) from None


def read_text(path: Path, most_bytes: int = SMALL_BYTES) -> str:
    """Returns the text of a file in UTF-8. Raises UserError for what is no regular file, and so may never end, and for
    one of more than `most_bytes`; OSError and UnicodeDecodeError where it cannot be read."""
    with open_regular(path) as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise UserError(
            f"{path} has more than {most_bytes:,} bytes, the most that such a file may have; correct it."
        )
    return content.decode()


def open_regular(path: Path) -> BinaryIO:
    """Opens a file to read. Raises UserError for what is no regular file: a device or a pipe may never end."""
    # a pipe would wait for somebody who writes
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise UserError(f"{path} is no regular file, but a device, pipe or socket; give a file.")
    return file


def check_downloaded(file: Path) -> None:
    """Raises ConfigError where `file` is the pointer that git leaves in the place of a large file."""
    with open_regular(file) as opened:
        begin = opened.read(len(LFS_POINTER))
    if begin == LFS_POINTER:
        raise ConfigError(f"{file} is a pointer of git-lfs, not the file itself; run: git lfs pull.")


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
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_directory(path.parent)


def follow_umask(path: Path) -> None:
    """Gives a file that a library made for its owner alone the mode that any new file has."""
    # os.umask can only be asked by changing it, for all threads
    status = Path("/proc/self/status").read_text()
    umask = re.search(r"^Umask:\s*([0-7]+)$", status, re.MULTILINE)
    assert umask is not None
    path.chmod(0o666 & ~int(umask[1], 8))


def write_private(path: Path, text: str) -> None:
    """Writes a new file that its owner alone may read, whatever the umask."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)


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
