"""Problems from files of JSON lines, an object per line. Whatever is wrong with one is named with file and line."""

import codecs
import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from sdpo_megatron.errors import UserError, quoted
from sdpo_megatron.records import Problem

Fields = TypeVar("Fields", bound=BaseModel)


class Row(BaseModel):
    """The base of what a published file's lines hold; what else is in a line is passed over. The lines of users' own
    files are Sections, in which an unknown key is a mistake."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


@dataclass(frozen=True)
class Line:
    """One line that is not blank."""

    where: str
    """File and line, as messages begin with."""
    number: int
    """From 1 on."""
    values: dict[str, Any]

    def fields(self, model: type[Fields]) -> Fields:
        """Returns the line as that model has it, or raises a UserError that names file, line and field."""
        strict = model.model_config.get("extra") == "forbid"
        unknown = [key for key in self.values if key not in model.model_fields]
        if unknown and strict:
            known = ", ".join(model.model_fields)
            raise UserError(
                f"{self.where}: unknown key '{unknown[0]}'.{_meant(unknown[0], model.model_fields)} Known: {known}."
            )
        try:
            return model.model_validate(self.values)
        except ValidationError as error:
            raise UserError(f"{self.where}: {_first_mistake(error, unknown)}") from None


def read_problems(path: str | Path, problem_of: Callable[[Line], Problem], example: str) -> list[Problem]:
    """Returns the problems of one file, in its order; blank lines are skipped. A UserError names file and line.

    `example` is a line that the file may hold.
    """
    path = Path(path).expanduser()
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
    except FileNotFoundError:
        raise UserError(f"There is no problem file {path}: correct its path in task.options.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a directory: name a file of JSON lines in task.options.") from None
    problems: list[Problem] = []
    line_of: dict[str, int] = {}
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        where = f"{path} line {number}"
        problem = problem_of(Line(where, number, _json_object(text, where, example)))
        if problem.id in line_of:
            first = line_of[problem.id]
            own = "" if problem.id != str(number) else ", which a line without an id has for its number"
            raise UserError(
                f"{where}: id {quoted(problem.id)} is that of line {first} too{own}; give it its own."
            )
        line_of[problem.id] = number
        problems.append(problem)
    if not problems:
        raise UserError(f"{path} holds no problem: write one JSON object per line, {example}.")
    return problems


class _Repeated(Exception):
    """A key that an object has twice; JSON parsers would take the last one."""


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise _Repeated(key)
        values[key] = value
    return values


def _json_object(line: bytes, where: str, example: str) -> dict[str, Any]:
    try:
        values = json.loads(line.decode("utf-8"), object_pairs_hook=_each_key_once)
        json.dumps(values, ensure_ascii=False).encode("utf-8")
    except _Repeated as error:
        raise UserError(f"{where}: the key {quoted(error.args[0])} is there twice; remove one.") from None
    except UnicodeDecodeError:
        raise UserError(f"{where}: not UTF-8; save the file as UTF-8.") from None
    except UnicodeEncodeError:
        raise UserError(f"{where}: half a character (a surrogate) is escaped there; correct it.") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not JSON ({error.msg} at column {error.colno}); write one JSON object on one line."
        ) from None
    # a number of thousands of digits, thousands of brackets
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON that can be read ({error}); correct it.") from None
    if not isinstance(values, dict):
        raise UserError(f"{where}: not a JSON object; write {example}.")
    return values


def _first_mistake(error: ValidationError, unknown: list[str]) -> str:
    detail = error.errors()[0]
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "missing":
        close = difflib.get_close_matches(key, unknown, n=1)
        return f"'{key}' is missing; " + (f"is it '{close[0]}'?" if close else "add it.")
    return f"'{key}' is {quoted(detail['input'])}: {detail['msg'][:1].lower()}{detail['msg'][1:]}."


def _meant(key: str, known: Any) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f" Did you mean '{close[0]}'?" if close else ""
