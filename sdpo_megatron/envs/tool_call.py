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
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from sdpo_megatron.config import Section
from sdpo_megatron.envs.base import Environment
from sdpo_megatron.envs.data.json_lines import Line, Row, read_problems
from sdpo_megatron.envs.judging.tool_calls import Unreadable, gold_calls, judge, judge_as_official
from sdpo_megatron.errors import UserError
from sdpo_megatron.records import Grade, Message, Problem, Rollout

_EXAMPLE = '{"prompt": ..., "answer": [{"Action": ..., "Action_Input": {...}}]}'


class ToolCallOptions(Section):
    train_file: str
    test_file: str | None = None
    """Held-out problems; without it there are none."""
    grader: Literal["default", "official"] = "default"
    """`official` scores as lasgroup/SDPO's grader does, for comparison with its figures: it cannot read nested
    arguments, so that two of ToolUse's 68 right answers score 0, and its feedback tells the right calls."""


class ToolCall(Environment):
    Options: ClassVar = ToolCallOptions

    def __init__(self, options: ToolCallOptions) -> None:
        """Raises UserError, with file and line, for a file that is missing, empty or malformed."""
        self._judge = judge_as_official if options.grader == "official" else judge
        self._train = read_problems(options.train_file, _problem, _EXAMPLE)
        self._test = read_problems(options.test_file, _problem, _EXAMPLE) if options.test_file else []

    def train_problems(self) -> Sequence[Problem]:
        return self._train

    def test_problems(self) -> Sequence[Problem]:
        return self._test

    def grade(self, problem: Problem, rollout: Rollout) -> Grade:
        return self._judge(rollout.text, gold_calls(problem.answer))


class _Row(Row):
    id: str | int | None = None
    idx: int | None = None
    prompt: Annotated[str, Field(min_length=1)]
    answer: str | list[Any]
    system: str | None = None


def _problem(line: Line) -> Problem:
    row = line.fields(_Row)
    answer = row.answer if isinstance(row.answer, str) else json.dumps(row.answer)
    try:
        gold_calls(answer)
    except Unreadable as problem:
        raise UserError(f"{line.where}: 'answer': {problem} Write {_EXAMPLE}.") from None
    messages = [Message(role="user", content=row.prompt)]
    if row.system:
        messages.insert(0, Message(role="system", content=row.system))
    names = [name for name in (row.id, row.idx) if name is not None]
    return Problem(id=str(names[0] if names else line.number), messages=messages, answer=answer)
