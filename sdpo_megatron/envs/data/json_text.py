"""JSON as a data file has to have it: each key once, whole characters, an error that says where."""

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

from sdpo_megatron.errors import UserError, quoted

_CHUNK = 1 << 20
"""Characters that are read at a time of a list."""
_BLANKS = re.compile(r"[ \t\n\r]*")
_LONGEST_MARK = 16
"""Characters at the end of which a number, a word or an escape may be cut by a chunk's end."""


class _Repeated(Exception):
    """A key that an object has twice; JSON parsers would take the last one."""


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise _Repeated(key)
        values[key] = value
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_each_key_once)


def read_object(text: str, where: str, example: str) -> dict[str, Any]:
    """Returns the object that `text` is, or raises UserError that begins with `where`; `example` is one."""
    text = text.strip()
    try:
        value, end = _decoded(text, 0, where)
    except json.JSONDecodeError as error:
        raise _not_json(where, f"{error.msg} at column {error.colno}") from None
    if end < len(text):
        raise _not_json(where, f"extra data at column {end + 1}")
    return _object(value, text, where, example)


def read_list(file: TextIO, path: str, example: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields place, from 1 on, and value of each object of the one list that a file holds. Of the file no more is in
    memory than about its longest entry."""
    text, at, ended, place = file.read(_CHUNK).lstrip().removeprefix("["), 0, False, 0
    while True:
        where = f"{path} entry {place + 1}"
        at = _past_blanks(text, at)
        if text.startswith("]", at) and place == 0:
            break
        parsed = _entry(text, at, where, whole=ended)
        if parsed is None:
            more = file.read(max(_CHUNK, len(text) - at))
            text, at, ended = text[at:] + more, 0, not more
            continue
        value, end = parsed
        yield place + 1, _object(value, text[at:end], where, example)
        place, at = place + 1, _past_blanks(text, end)
        while at == len(text) and (more := file.read(_CHUNK)):
            text, at = more, _past_blanks(more, 0)
        if text.startswith("]", at):
            break
        if not text.startswith(",", at):
            raise _not_json(where, "neither a comma nor ] behind it")
        at += 1
    rest = text[at + 1 :]
    while not rest.strip() and (rest := file.read(_CHUNK)):
        continue
    if rest.strip():
        raise UserError(
            f"{path}: behind the end of its list stands {quoted(rest.strip())}; make it one list."
        )


def _past_blanks(text: str, at: int) -> int:
    found = _BLANKS.match(text, at)
    return found.end() if found else at


def _entry(text: str, at: int, where: str, *, whole: bool) -> tuple[Any, int] | None:
    """The value at this place of `text` and its end; None where more of the file has to be read for it."""
    try:
        return _decoded(text, at, where)
    except json.JSONDecodeError as error:
        near_end = error.pos + _LONGEST_MARK >= len(text) or error.msg.startswith("Unterminated")
        if near_end and not whole:
            return None
        raise _not_json(where, error.msg) from None


def _decoded(text: str, at: int, where: str) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, at)
    except _Repeated as error:
        raise UserError(f"{where}: the key {quoted(error.args[0])} is there twice; remove one.") from None
    except json.JSONDecodeError:
        raise
    # a number of thousands of digits, thousands of brackets
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON that can be read ({error}); correct it.") from None


def _not_json(where: str, reason: str) -> UserError:
    return UserError(f"{where}: not JSON ({reason}); write one JSON object on one line.")


def _object(value: Any, text: str, where: str, example: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: not a JSON object; write {example}.")
    if re.search(r"\\ud[89a-f]", text, re.IGNORECASE):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{where}: half a character (a surrogate) is escaped there; correct it."
            ) from None
    return value
