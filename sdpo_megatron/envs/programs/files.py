"""Rows of published files: JSON lines, or one JSON list, also compressed."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from sdpo_megatron.envs.data.json_lines import Line
from sdpo_megatron.errors import UserError


def rows(path: str | Path) -> Iterator[Line]:
    """Yields the objects of a file in its order. Raises UserError, which names file and line."""
    path = Path(path).expanduser()
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        text = data.decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"There is no problem file {path}: correct its path in task.options.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a directory: name a file of JSON lines in task.options.") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is a damaged gzip file ({error}); get it again.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8; save it as UTF-8.") from None
    if text.lstrip().startswith("["):
        values = _parsed(text, str(path))
        assert isinstance(values, list)
        for number, value in enumerate(values, start=1):
            yield _line(value, f"{path} entry {number}", number)
        return
    # not splitlines: JSON may hold other separators of lines as they are
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
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
