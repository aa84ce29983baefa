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

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from sdpo_megatron.config import Section
from sdpo_megatron.envs.base import look_up
from sdpo_megatron.envs.data.lines import Line
from sdpo_megatron.envs.from_files import FileOptions, FromFiles
from sdpo_megatron.envs.graders import GRADERS, unanswerable
from sdpo_megatron.errors import ConfigError, UserError
from sdpo_megatron.records import Grade, Message, Problem, Rollout


class JsonlOptions(FileOptions):
    grader: str = "exact"
    """The grader of problems that name none."""


class JsonlProblems(FromFiles):
    Options = JsonlOptions
    example = '{"prompt": ..., "answer": ...}'

    def __init__(self, options: JsonlOptions) -> None:
        """Raises UserError, with file and line, for a file that is missing, empty or malformed."""
        look_up("grader (task.options.grader)", options.grader, GRADERS)
        super().__init__(options)

    @classmethod
    def problem(cls, line: Line, options: JsonlOptions) -> Problem:
        parsed, where = line.fields(_Line), line.where
        grader = parsed.grader or options.grader
        try:
            look_up("grader", grader, GRADERS)
        except ConfigError as error:
            raise UserError(f"{where}: {error}") from None
        reason = unanswerable(grader, parsed.answer)
        if reason:
            raise UserError(f"{where}: {reason}")
        return Problem(
            id=line.name(parsed.id),
            messages=_messages(parsed, line),
            answer=parsed.answer,
            grader=grader,
            canonical=parsed.canonical,
            metadata=parsed.metadata,
        )

    def grade(self, problem: Problem, rollout: Rollout) -> Grade:
        return GRADERS[problem.grader](problem, rollout.text)


class _Turn(Section):
    role: Literal["system", "user", "assistant"]
    content: str


def _as_text(value: Any) -> Any:
    """A number is taken for its digits: files that were not made for us write answers so."""
    return str(value) if type(value) in (int, float) else value


class _Line(Section):
    id: str | None = Field(default=None, min_length=1)
    prompt: str | None = None
    messages: list[_Turn] | None = None
    answer: Annotated[str, BeforeValidator(_as_text)]
    grader: str | None = Field(default=None, min_length=1)
    canonical: bool = False
    metadata: dict[str, Any] = {}


def _messages(row: _Line, line: Line) -> list[Message]:
    if (row.prompt is None) == (row.messages is None):
        raise UserError(f"{line.where}: write either 'prompt' or 'messages'. {line.shown()}")
    if row.prompt is not None:
        return [Message(role="user", content=row.prompt)]
    turns = row.messages or []
    if not turns or turns[-1].role != "user":
        raise UserError(f"{line.where}: 'messages' must end with a turn whose role is user.")
    return [Message(role=turn.role, content=turn.content) for turn in turns]
