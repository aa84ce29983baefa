"""evaluations.jsonl: one line for each evaluation of a set of problems, with the ruler that it was measured by.

Training writes it into the run directory, `python -m sdpo_megatron.evaluate` into a directory of its own.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdpo_megatron.errors import UserError
from sdpo_megatron.files import write_atomically

HELD_OUT = "test"
"""The name of the task's own held-out problems as a suite."""
Ruler = Mapping[str, str]
"""What a number was measured with, part by part, in words and hashes that a reader can compare."""


@dataclass(frozen=True, kw_only=True)
class ProblemResult:
    """What the responses to one problem came to."""

    id: str
    graded: int
    """Responses that have a grade."""
    correct: int
    """Those of them whose reward reaches reprompt.success_reward_threshold."""
    majority: float | None = None
    """The share of right ones among the commonest answers; None where the grader does not say what was answered."""
    domain: str = ""
    difficulty: str = ""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One model's responses to one set of problems, in numbers."""

    suite: str
    """`test` for the task's own held-out problems, else the name under eval.suites."""
    step: int | None
    """Training steps of the run that the weights have seen; None for weights of no known run."""
    subject: Mapping[str, str]
    """`name` of what was evaluated, and `weights`, their SHA-256 where their files are known."""
    ruler: Ruler
    metrics: Mapping[str, float]
    problems: Sequence[ProblemResult] = field(default_factory=list)

    def line(self) -> str:
        return json.dumps(dataclasses.asdict(self)) + "\n"


class EvaluationsFile:
    """Appends evaluations, each on the disk before `append` returns."""

    def __init__(self, path: Path, first_step: int | None = None) -> None:
        """Opens `path`, and drops a last line that a crash cut short; and what is there from `first_step` on, which a
        resumed run makes again."""
        self._path = path
        if path.is_file():
            before = read_evaluations(path)
            if first_step is not None:
                before = [one for one in before if one.step is not None and one.step < first_step]
            write_atomically(path, "".join(one.line() for one in before))

    def append(self, evaluation: Evaluation) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(evaluation.line())
            file.flush()
            os.fsync(file.fileno())


def read_evaluations(path: Path) -> list[Evaluation]:
    """Returns all complete evaluations; a last line that a crash cut short does not count. Raises UserError for any
    other damage, and where there is no such file."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    return [_parsed(line, f"{path} line {number}") for number, line in enumerate(lines, start=1)]


def _parsed(line: bytes, where: str) -> Evaluation:
    try:
        values: dict[str, Any] = json.loads(line)
        problems = [ProblemResult(**problem) for problem in values.pop("problems")]
        return Evaluation(**values, problems=problems)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{where} is no evaluation; restore the file, or remove it.") from None
