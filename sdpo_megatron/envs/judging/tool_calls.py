"""Calls of tools, written as `Action:` and `Action Input:`, compared with the right ones.

This is the format of ToolUse (ToolAlpaca): the action's line names the tool, its input is a JSON object.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from sdpo_megatron.records import Grade

_MARK = r"^[ \t>*_#`-]*"
"""What models put before a word that they set off in Markdown."""
_ACTION = re.compile(_MARK + r"Action[*_ ]*:[*_]*[ \t]*(.*)$", re.MULTILINE)
_INPUT = re.compile(r"\s*" + _MARK + r"Action Input[*_ ]*:[*_]*\s*(?:```\w*\s*|`)?", re.MULTILINE)


@dataclass(frozen=True)
class ToolCall:
    """One call: the tool's name, and its arguments as JSON values."""

    name: str
    arguments: dict[str, Any]


class Unreadable(ValueError):
    """A text that is no list of calls; the message is a sentence that says why."""


def gold_calls(answer: str) -> list[ToolCall]:
    """Reads a right answer: a JSON list of {"Action": name, "Action_Input": arguments}, the arguments a JSON object or
    one as text, as ToolUse has it. Raises Unreadable for anything else."""
    entries = _json(answer, "The answer")
    if not isinstance(entries, list) or not entries:
        raise Unreadable("The answer is not a JSON list of at least one call.")
    calls: list[ToolCall] = []
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or set(entry) != {"Action", "Action_Input"}:
            raise Unreadable(f"Call {number} of the answer is not an object of Action and Action_Input.")
        name, arguments = entry["Action"], entry["Action_Input"]
        if isinstance(arguments, str):
            arguments = _json(arguments, f"Action_Input of call {number} of the answer")
        if not isinstance(name, str) or not name.strip():
            raise Unreadable(f"Action of call {number} of the answer is not a name.")
        if not isinstance(arguments, dict):
            raise Unreadable(f"Action_Input of call {number} of the answer is not a JSON object.")
        calls.append(ToolCall(name.strip(), arguments))
    return calls


def written_calls(text: str) -> list[ToolCall]:
    """Returns the calls of a response, in order; empty where it makes none.

    A name stands on the line of its `Action:`, its `Action Input:` on the next that is not empty. The arguments may go
    over several lines and stand in a code block. Raises Unreadable for a call without them, or with other than a JSON
    object.
    """
    calls: list[ToolCall] = []
    place = 0
    while action := _ACTION.search(text, place):
        name = action[1].strip(" \t\r*_`\"'")
        if not name:
            raise Unreadable("An Action names no tool.")
        given = _INPUT.match(text, action.end())
        if given is None:
            raise Unreadable(f"Action {_shown(name)} has no Action Input on the next line.")
        try:
            arguments, place = _DECODER.raw_decode(text, given.end())
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise Unreadable(f"Action Input of {_shown(name)} is not a JSON object.")
        calls.append(ToolCall(name, arguments))
    return calls


def judge(text: str, gold: Sequence[ToolCall]) -> Grade:
    """A response is right if it makes the right calls, each with its own arguments, in any order.

    Arguments are compared as JSON values: 1 is 1.0, the order of keys does not count, and neither "1" nor true is 1.
    The feedback says what is wrong and never what would be right.
    """
    try:
        calls = written_calls(text)
    except Unreadable as problem:
        return Grade(reward=0.0, feedback=str(problem), correct_format=False)
    if not calls:
        return Grade(
            reward=0.0,
            feedback="The response calls no tool; write Action: and, on the next line, Action Input:.",
            correct_format=False,
        )
    missing = list(gold)
    wrong: list[ToolCall] = []
    for call in calls:
        match = next((m for m, right in enumerate(missing) if _same_call(call, right)), None)
        if match is None:
            wrong.append(call)
        else:
            del missing[match]
    if not wrong and not missing:
        return Grade(reward=1.0)
    return Grade(reward=0.0, feedback=_difference(wrong, missing))


def judge_as_official(text: str, gold: Sequence[ToolCall]) -> Grade:
    """Scores as SDPO's published grader does (lasgroup/SDPO, feedback/tooluse.py), for comparison with its figures.

    It compares the names as a multiset, and the arguments of all calls put together into one object, where a later
    call's overwrite an earlier one's. An input ends at its first closing brace, so that nested arguments are lost, and
    a name at its first character that is not of a word: two of ToolUse's 68 right answers score 0. Like the
    published one its feedback tells the right calls.
    """
    names = re.findall(r"Action:\s*(\w+)", text)
    arguments: dict[str, Any] = {}
    for written in re.finditer(r"Action Input:\s*(\{[^}]*\})", text):
        try:
            arguments |= json.loads(written[1])
        except (ValueError, RecursionError):
            # the published grader passes over what it cannot read
            continue
    right_names = [call.name for call in gold]
    right_arguments = {key: value for call in gold for key, value in call.arguments.items()}
    feedback: list[str] = []
    if Counter(names) != Counter(right_names):
        feedback.append(f"The actions are {names}; right are {right_names}.")
    if arguments != right_arguments:
        feedback.append(f"The action inputs are {arguments}; right are {right_arguments}.")
    return Grade(
        reward=0.0 if feedback else 1.0,
        feedback=" ".join(feedback),
        correct_format="\nAction Input:" in text.partition("Action:")[2],
    )


def _difference(wrong: Sequence[ToolCall], missing: Sequence[ToolCall]) -> str:
    """The first thing that is wrong: a tool, how often it is called, or which of its arguments."""
    called, needed = Counter(call.name for call in wrong), Counter(call.name for call in missing)
    for name in called - needed:
        return f"The call of {_shown(name)} is not among the right ones, or is one too many."
    if called != needed:
        return "A call is missing."
    call = wrong[0]
    rights = [right.arguments for right in missing if right.name == call.name]
    if all(set(call.arguments) != set(right) for right in rights):
        return f"The call of {_shown(call.name)} has other arguments than it needs."
    return f"The call of {_shown(call.name)} has an argument whose value is wrong."


def _same_call(call: ToolCall, right: ToolCall) -> bool:
    return call.name == right.name and _same(call.arguments, right.arguments)


def _same(value: Any, right: Any) -> bool:
    """Whether two JSON values are equal. Python alone would take true for 1."""
    if isinstance(value, dict) and isinstance(right, dict):
        return value.keys() == right.keys() and all(_same(value[key], right[key]) for key in right)
    if isinstance(value, list) and isinstance(right, list):
        return len(value) == len(right) and all(_same(v, r) for v, r in zip(value, right, strict=True))
    return isinstance(value, bool) == isinstance(right, bool) and value == right


def _no_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_json)
"""Python's own also reads NaN and Infinity."""


def _json(text: str, what: str) -> Any:
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError):
        raise Unreadable(f"{what} is not JSON.") from None


def _shown(name: str) -> str:
    return name if len(name) <= 60 else name[:60] + "…"
