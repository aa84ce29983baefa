"""metrics.jsonl: one JSON object per step, every step once and in order, whatever ended the process that
wrote it."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdpo_megatron.errors import UserError
from sdpo_megatron.files import sync_directory, write_atomically


class MetricsFile:
    """Appends rows, each on the disk before `append` returns."""

    def __init__(self, path: Path, first_step: int) -> None:
        """Opens `path` for rows from `first_step` on: later ones, which a resumed run makes again, are
        dropped.

        Raises UserError if a row before `first_step` is missing.
        """
        self._path = path
        self._next = first_step
        kept = rows_before(path, first_step)
        write_atomically(path, "".join(f"{json.dumps(row)}\n" for row in kept))

    def append(self, row: Mapping[str, Any]) -> None:
        """`row["step"]` must follow the last one. Numbers that JSON cannot hold (NaN, infinity) are stored as
        null."""
        if row["step"] != self._next:
            raise ValueError(f"row of step {row['step']}, but step {self._next} comes next")
        clean = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(clean)}\n")
            file.flush()
            os.fsync(file.fileno())
        if self._next == 0:
            sync_directory(self._path.parent)
        self._next += 1


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns all complete rows, none where there is no file; a last line that a crash cut short does not count.
    Raises UserError for any other damage."""
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    rows = []
    # after the last newline: nothing, or a torn line
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
            row["step"]
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path} line {number} is damaged; restore it, or remove {path.parent}."
            ) from None
        rows.append(row)
    return rows


def rows_before(path: Path, first_step: int) -> list[dict[str, Any]]:
    """Returns the rows that a run which goes on from `first_step` has behind it. Raises UserError if one is missing."""
    rows = [row for row in read_rows(path) if row["step"] < first_step]
    if [row["step"] for row in rows] != list(range(first_step)):
        raise UserError(
            f"{path} must hold the steps 0 to {first_step - 1} once each, in order, to go on from step {first_step}; "
            f"restore it, or remove {path.parent} and start again."
        )
    return rows
