"""Requests to be answered by calls of tools, which are compared and not carried out: ToolUse (ToolAlpaca), own files.

A line holds

    prompt   text: the request, the tools, and the form in which to call them: `Action:` and `Action Input:`
    answer   the right calls, a list of {"Action": name, "Action_Input": arguments}, or such a list as JSON text; the
             arguments are an object, or one as JSON text
    system   text of a system turn; may be null or left away
    idx, id  number or text, unique in its file; by default the line's number

and whatever else ToolUse's files hold, which is passed over.
"""

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from sdpo_megatron.envs.base import Part
from sdpo_megatron.envs.data.lines import Line, Row
from sdpo_megatron.envs.from_files import FileOptions, FromFiles
from sdpo_megatron.envs.judging.tool_calls import (
    Unreadable,
    gold_calls,
    judge,
    judge_as_official,
    written_calls,
)
from sdpo_megatron.errors import UserError
from sdpo_megatron.records import Grade, Message, Problem, Rollout

if TYPE_CHECKING:
    from sdpo_megatron.run_dir.records_file import RecordedResponse


class ToolCallOptions(FileOptions):
    grader: Literal["default", "official"] = "default"
    """`official` scores as lasgroup/SDPO's grader does, for comparison with its figures: it cannot read nested
    arguments, so that two of ToolUse's 68 right answers score 0, and its feedback tells the right calls."""


class ToolCall(FromFiles):
    Options = ToolCallOptions
    example = '{"prompt": ..., "answer": [{"Action": ..., "Action_Input": {...}}]}'

    @classmethod
    def problem(cls, line: Line, options: ToolCallOptions) -> Problem:
        row = line.fields(_Row)
        answer = row.answer if isinstance(row.answer, str) else json.dumps(row.answer)
        try:
            gold_calls(answer)
        except Unreadable as reason:
            raise UserError(f"{line.where}: 'answer': {reason} Write {cls.example}.") from None
        messages = [Message(role="user", content=row.prompt)]
        if row.system:
            messages.insert(0, Message(role="system", content=row.system))
        return Problem(id=line.name(row.id, row.idx), messages=messages, answer=answer)

    def grade(self, problem: Problem, rollout: Rollout) -> Grade:
        judged = judge_as_official if self.options.grader == "official" else judge
        return judged(rollout.text, gold_calls(problem.answer))

    @classmethod
    def render(cls, response: "RecordedResponse") -> list[Part]:
        """Each call that can be read, and all that was answered."""
        try:
            calls = written_calls(response.response)
        except Unreadable as reason:
            parts = [Part(kind="text", title="Calls that cannot be read", text=str(reason))]
        else:
            parts = [
                Part(
                    kind="json",
                    title=f"Call of {call.name}",
                    text=json.dumps(call.arguments, indent=2, ensure_ascii=False),
                )
                for call in calls
            ]
        return [*parts, *super().render(response)]


class _Row(Row):
    id: str | int | None = None
    idx: int | None = None
    prompt: Annotated[str, Field(min_length=1)]
    answer: str | list[Any]
    system: str | None = None
