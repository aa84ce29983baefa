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

from typing import Any, Literal

from pydantic import Field

from sdpo_megatron.config import Section
from sdpo_megatron.envs.base import look_up
from sdpo_megatron.envs.data.json_lines import Line
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

    def problem(self, line: Line) -> Problem:
        parsed, where = line.fields(_Line), line.where
        grader = parsed.grader or self.options.grader
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

    def grade(self, problem: Problem, rollout: Rollout) -> Grade:
        return GRADERS[problem.grader](problem, rollout.text)


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


def _messages(line: _Line, where: str) -> list[Message]:
    if (line.prompt is None) == (line.messages is None):
        raise UserError(f"{where}: write either 'prompt' or 'messages'.")
    if line.prompt is not None:
        return [Message(role="user", content=line.prompt)]
    turns = line.messages or []
    if not turns or turns[-1].role != "user":
        raise UserError(f"{where}: 'messages' must end with a turn whose role is user.")
    return [Message(role=turn.role, content=turn.content) for turn in turns]
