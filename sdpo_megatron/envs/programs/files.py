"""Rows of published files: JSON lines, or one JSON list, also compressed."""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from sdpo_megatron.envs.data.json_lines import Line
from sdpo_megatron.errors import UserError


def rows(path: str | Path) -> Iterator[Line]:
    """Yields the objects of a file in its order. Raises UserError, which names file and line."""
    path = Path(path).expanduser()
    try:
        with path.open("rb") as plain:
            compressed = plain.read(2) == b"\x1f\x8b"
        # a set may have gigabytes of tests: line by line
        with gzip.open(path) if compressed else path.open("rb") as file:
            yield from _rows(file, path)
    except FileNotFoundError:
        raise UserError(f"There is no problem file {path}: correct its path in task.options.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a directory: name a file of JSON lines in task.options.") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is a damaged gzip file ({error}); get it again.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8; save it as UTF-8.") from None


def _rows(file: Iterable[bytes], path: Path) -> Iterator[Line]:
    lines = iter(file)
    for number, data in enumerate(lines, start=1):
        line = data.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        if number == 1 and line.startswith("["):
            values = _parsed(line + b"".join(lines).decode(), str(path))
            assert isinstance(values, list)
            for place, value in enumerate(values, start=1):
                yield _line(value, f"{path} entry {place}", place)
        elif line:
            where = f"{path} line {number}"
            yield _line(_parsed(line, where), where, number)


def _parsed(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno} column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise UserError(
            f"{where}: not JSON ({error.msg} at {at}); write one JSON object on one line."
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON that can be read ({error}); correct it.") from None


def _line(value: object, where: str, number: int) -> Line:
    if not isinstance(value, dict):
        raise UserError(f"{where}: not a JSON object; a question is one.")
    return Line(where, number, value)
