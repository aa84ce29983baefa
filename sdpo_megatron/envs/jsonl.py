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

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from sdpo_megatron.config import Section
from sdpo_megatron.envs.base import Environment, look_up
from sdpo_megatron.envs.data import json_lines
from sdpo_megatron.envs.graders import GRADERS, unanswerable
from sdpo_megatron.envs.templates import TemplateSettings
from sdpo_megatron.errors import ConfigError, UserError
from sdpo_megatron.records import Grade, Message, Problem, Rollout

_EXAMPLE = '{"prompt": ..., "answer": ...}'


class JsonlOptions(Section):
    train_file: str
    test_file: str | None = None
    """Held-out problems; without it there are none."""
    grader: str = "exact"
    """The grader of problems that name none."""
    template: TemplateSettings = TemplateSettings()
    """How the teacher is shown a solution or feedback."""


class JsonlProblems(Environment):
    Options: ClassVar = JsonlOptions

    def __init__(self, options: JsonlOptions) -> None:
        """Raises UserError, with file and line, for a file that is missing, empty or malformed."""
        look_up("grader (task.options.grader)", options.grader, GRADERS)
        self._train = read_problems(Path(options.train_file), options.grader)
        self._test = read_problems(Path(options.test_file), options.grader) if options.test_file else []
        self._template = options.template.template()

    def train_problems(self) -> Sequence[Problem]:
        return self._train

    def test_problems(self) -> Sequence[Problem]:
        return self._test

    def grade(self, problem: Problem, rollout: Rollout) -> Grade:
        return GRADERS[problem.grader](problem, rollout.text)

    def show(self, problem: Problem, solution: str | None, feedback: str | None) -> list[Message]:
        return self._template.show(problem, solution, feedback)


def read_problems(path: Path, default_grader: str) -> list[Problem]:
    """Returns the problems of one file, in its order; blank lines are skipped. A UserError names file and line."""
    return json_lines.read_problems(path, lambda line: _problem(line, default_grader), _EXAMPLE)


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


def _problem(line: json_lines.Line, default_grader: str) -> Problem:
    parsed, where = line.fields(_Line), line.where
    grader = parsed.grader or default_grader
    try:
        look_up("grader", grader, GRADERS)
    except ConfigError as error:
        raise UserError(f"{where}: {error}") from None
    reason = unanswerable(grader, parsed.answer)
    if reason:
        raise UserError(f"{where}: {reason}")
    return Problem(
        id=parsed.id or str(line.number),
        messages=_messages(parsed, where),
        answer=parsed.answer,
        grader=grader,
        canonical=parsed.canonical,
        metadata=parsed.metadata,
    )


def _messages(line: _Line, where: str) -> list[Message]:
    if (line.prompt is None) == (line.messages is None):
        raise UserError(f"{where}: write either 'prompt' or 'messages'.")
    if line.prompt is not None:
        return [Message(role="user", content=line.prompt)]
    turns = line.messages or []
    if not turns or turns[-1].role != "user":
        raise UserError(f"{where}: 'messages' must end with a turn whose role is user.")
    return [Message(role=turn.role, content=turn.content) for turn in turns]
