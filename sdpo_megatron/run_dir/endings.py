"""Why a rank ended, in its own words: the rank writes the file just before it exits, the launcher reads it."""

import json
from pathlib import Path
from typing import TypedDict

from sdpo_megatron.files import write_atomically


class StatedEnding(TypedDict):
    exit_code: int
    """The code with which the rank is about to exit."""
    message: str
    """The message as it stands in the rank's log: one line, and perhaps the end of another log below."""


def write_ending(path: Path, exit_code: int, message: str) -> None:
    """Writes `path`, of `RunDirectory.ending`, in one step. Raises OSError where the disk does not take it."""
    write_atomically(path, json.dumps(StatedEnding(exit_code=exit_code, message=message)) + "\n")


def read_ending(path: Path) -> StatedEnding | None:
    """Returns what the rank stated; None where it did not."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def clear_endings(directory: Path) -> None:
    """Removes what the ranks of an earlier start stated in `directory`, of `RunDirectory.endings`."""
    for path in directory.iterdir():
        path.unlink()
