"""Problems from files of JSON lines. One line holds one problem, an object with

    id         text, unique in its file; by default the line's number
    prompt     text: the question, as a single user turn; or instead
    messages   list of {"role": "system" | "user" | "assistant", "content": text}, of which the last is a user turn
    answer     text that the grader compares with
    grader     a name in envs.GRADERS; by default the option `grader`
    canonical  true if `answer` is the one right response, word for word (false)
    metadata   an object that is kept as it is ({})

for example  {"prompt": "What is 2 + 2?", "answer": "2 + 2 = 4", "grader": "equation", "canonical": true}
"""

import codecs
import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationError

from sdpo_megatron.config import Section
from sdpo_megatron.envs.base import Environment, look_up
from sdpo_megatron.envs.graders import GRADERS, unanswerable
from sdpo_megatron.errors import ConfigError, UserError, quoted
from sdpo_megatron.records import Grade, Message, Problem, Rollout

_EXAMPLE = '{"prompt": ..., "answer": ...}'


class JsonlOptions(Section):
    train_file: str
    test_file: str | None = None
    """Held-out problems; without it there are none."""
    grader: str = "exact"
    """The grader of problems that name none."""


class JsonlProblems(Environment):
    Options: ClassVar = JsonlOptions

    def __init__(self, options: JsonlOptions) -> None:
        """Raises UserError, with file and line, for a file that is missing, empty or malformed."""
        look_up("grader (task.options.grader)", options.grader, GRADERS)
        self._train = read_problems(Path(options.train_file), options.grader)
        self._test = read_problems(Path(options.test_file), options.grader) if options.test_file else []

    def train_problems(self) -> Sequence[Problem]:
        return self._train

    def test_problems(self) -> Sequence[Problem]:
        return self._test

    def grade(self, problem: Problem, rollout: Rollout) -> Grade:
        return GRADERS[problem.grader](problem, rollout.text)


def read_problems(path: Path, default_grader: str) -> list[Problem]:
    """Returns the problems of one file, in its order; blank lines are skipped. A UserError names file and line."""
    path = path.expanduser()
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
    except FileNotFoundError:
        raise UserError(f"There is no problem file {path}: correct its path in task.options.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a directory: name a file of JSON lines in task.options.") from None
    problems: list[Problem] = []
    line_of: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        problem = _problem(line, str(number), default_grader, where)
        if problem.id in line_of:
            first = line_of[problem.id]
            own = "" if problem.id != str(number) else ", which a line without an id has for its number"
            raise UserError(
                f"{where}: id {quoted(problem.id)} is that of line {first} too{own}; give it its own."
            )
        line_of[problem.id] = number
        problems.append(problem)
    if not problems:
        raise UserError(f"{path} holds no problem: write one JSON object per line, {_EXAMPLE}.")
    return problems


class _Turn(Section):
    role: Literal["system", "user", "assistant"]
    content: str


class _Line(Section):
    id: str | None = Field(default=None, min_length=1)
    prompt: str | None = None
    messages: list[_Turn] | None = None
    answer: str
    grader: str | None = Field(default=None, min_length=1)
    canonical: bool = False
    metadata: dict[str, Any] = {}


def _problem(line: bytes, default_id: str, default_grader: str, where: str) -> Problem:
    values = _json_object(line, where)
    unknown = [key for key in values if key not in _Line.model_fields]
    if unknown:
        close = difflib.get_close_matches(unknown[0], _Line.model_fields, n=1)
        meant = f" Did you mean '{close[0]}'?" if close else ""
        known = ", ".join(_Line.model_fields)
        raise UserError(f"{where}: unknown key '{unknown[0]}'.{meant} Known: {known}.")
    try:
        parsed = _Line.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {_first_mistake(error)}") from None
    grader = parsed.grader or default_grader
    try:
        look_up("grader", grader, GRADERS)
    except ConfigError as error:
        raise UserError(f"{where}: {error}") from None
    reason = unanswerable(grader, parsed.answer)
    if reason:
        raise UserError(f"{where}: {reason}")
    return Problem(
        id=parsed.id or default_id,
        messages=_messages(parsed, where),
        answer=parsed.answer,
        grader=grader,
        canonical=parsed.canonical,
        metadata=parsed.metadata,
    )


class _Repeated(Exception):
    """A key that an object has twice; JSON parsers would take the last one."""


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise _Repeated(key)
        values[key] = value
    return values


def _json_object(line: bytes, where: str) -> dict[str, Any]:
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
        raise UserError(f"{where}: not a JSON object; write {_EXAMPLE}.")
    return values


def _messages(line: _Line, where: str) -> list[Message]:
    if (line.prompt is None) == (line.messages is None):
        raise UserError(f"{where}: write either 'prompt' or 'messages'.")
    if line.prompt is not None:
        return [Message(role="user", content=line.prompt)]
    turns = line.messages or []
    if not turns or turns[-1].role != "user":
        raise UserError(f"{where}: 'messages' must end with a turn whose role is user.")
    return [Message(role=turn.role, content=turn.content) for turn in turns]


def _first_mistake(error: ValidationError) -> str:
    detail = error.errors()[0]
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "missing":
        return f"'{key}' is missing; add it."
    return f"'{key}' is {quoted(detail['input'])}: {detail['msg'][:1].lower()}{detail['msg'][1:]}."
