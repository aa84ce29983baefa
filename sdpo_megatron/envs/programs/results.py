"""What came of each test, told from what the harness says and from what was expected, which it does not know."""

import json
import math
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

from sdpo_megatron.envs.programs.cases import Case
from sdpo_megatron.envs.programs.messages import Kept, decoded
from sdpo_megatron.envs.sandbox.base import Outcome

Ending = Literal["passed", "wrong", "error", "syntax", "time", "memory", "output", "crash"]
RELATIVE, ABSOLUTE = 1e-6, 1e-9
"""By how much floating-point numbers that a function returns may differ."""
SHOWN_CHARACTERS = 4000


@dataclass(frozen=True)
class Result:
    """What came of one test."""

    case: Case | None
    """None where no test was reached."""
    ending: Ending
    output: str = ""
    """What was printed or returned; for code, the last value that it got."""
    printed: str = ""
    """What a called function printed besides."""
    error: str = ""
    """The exception in a line, or the signal."""
    frames: tuple[tuple[int, str, str], ...] = ()
    """Of the program's own last ones: line number, function, source."""
    statement: str = ""
    """The statement of a test that failed."""


def results_of(outcome: Outcome, cases: tuple[Case, ...]) -> list[Result]:
    """Returns the results in the order of the tests, as far as the harness came. Whatever a program did to the harness
    is the program's fault: it has no verdict then."""
    try:
        verdict = (
            json.loads(outcome.stdout_bytes) if outcome.limit is None and outcome.exit_code == 0 else None
        )
    except ValueError:
        verdict = None
    if not isinstance(verdict, dict):
        ending: Ending = (
            "time" if outcome.limit in ("wall", "cpu") else "output" if outcome.limit else "crash"
        )
        error = outcome.stderr_bytes.decode(errors="replace").strip().splitlines()
        return [Result(None, ending, error=error[-1] if error else "")]
    if "syntax" in verdict:
        shown = str(verdict["shown"])
        return [
            Result(None, "syntax", error=str(verdict["syntax"]), frames=((0, "", shown),) if shown else ())
        ]
    return [_result(case, told) for case, told in zip(cases, verdict["results"], strict=False)]


def _result(case: Case, told: dict[str, Any]) -> Result:
    printed = str(told.get("printed", ""))
    stopped, error = told.get("stopped"), told.get("error")
    if stopped in ("time", "output"):
        return Result(case, stopped, printed=printed)
    if stopped is not None:
        return Result(case, "crash", printed=printed, error="" if stopped == "crash" else str(stopped))
    if isinstance(error, dict):
        frames = tuple((int(number), str(name), str(source)) for number, name, source in error["frames"])
        ending: Ending = "memory" if error["type"] == "MemoryError" else "error"
        return Result(case, ending, printed=printed, error=str(error["line"]), frames=frames)
    if case.kind == "check":
        if told.get("passed") is True:
            return Result(case, "passed")
        if "failed" not in told:
            return Result(case, "crash", printed=printed)
        statement, said = str(told["failed"]), str(told["said"])
        return Result(case, "wrong", str(told["answer"]), printed, said, statement=statement)
    if case.kind == "stdin":
        right = same_text(printed, case.expected)
        return Result(case, "passed" if right else "wrong", printed)
    if "value" not in told:
        return Result(case, "crash", printed=printed)
    value = decoded(told["value"], Kept)
    right = same_value(value, json.loads(case.expected), case.wrapped)
    return Result(case, "passed" if right else "wrong", repr(value)[:SHOWN_CHARACTERS], printed)


def same_text(printed: str, expected: str) -> bool:
    """Whether texts are equal but for white space, and numbers by value: 1.50 is 1.5."""
    found, wanted = printed.split(), expected.split()
    return len(found) == len(wanted) and all(
        a == b or _same_number(a, b) for a, b in zip(found, wanted, strict=True)
    )


def _same_number(a: str, b: str) -> bool:
    try:
        x, y = Decimal(a), Decimal(b)
    except InvalidOperation:
        return False
    return x.is_finite() and x == y


def same_value(found: Any, expected: Any, wrapped: bool = False) -> bool:
    """Whether a value is what JSON says of it: tuples are lists there, and keys text."""
    if wrapped and isinstance(expected, list) and len(expected) == 1 and same_value(found, expected[0]):
        return True
    if isinstance(found, bool) or isinstance(expected, bool):
        return found is expected
    if isinstance(found, (int, float)) and isinstance(expected, (int, float)):
        if isinstance(found, int) and isinstance(expected, int):
            return found == expected
        return found == expected or math.isclose(found, expected, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
    if isinstance(found, (list, tuple)) and isinstance(expected, list):
        return len(found) == len(expected) and all(map(same_value, found, expected))
    if isinstance(found, dict) and isinstance(expected, dict):
        named = {str(key): value for key, value in found.items()}
        return named.keys() == expected.keys() and all(
            same_value(named[key], expected[key]) for key in expected
        )
    return type(found) is type(expected) and found == expected
