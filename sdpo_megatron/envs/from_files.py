"""What environments share whose problems lie in files."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from sdpo_megatron.config import Section
from sdpo_megatron.envs.base import Environment
from sdpo_megatron.envs.data.files import read_lines
from sdpo_megatron.envs.data.lines import Line
from sdpo_megatron.errors import UserError, quoted
from sdpo_megatron.records import Problem


class FileOptions(Section):
    train_file: str | None = None
    """Problems to train on; an evaluation needs none."""
    test_file: str | None = None
    """Held-out problems; without it there are none."""
    fields: dict[str, str] = {}
    """Our name of a field -> the name of a file's column, for files of other people: {prompt: question}. Columns that
    it does not name are passed over."""


class FromFiles(Environment):
    """A subclass says what a line is, and judges. Its Options derive from FileOptions."""

    Options: ClassVar[Any] = FileOptions
    example: ClassVar[str]
    """A line as messages show it."""

    def __init__(self, options: Any) -> None:
        """Raises UserError, with file and line, for a file that is missing, empty or malformed."""
        self.options = options
        if not options.train_file and not options.test_file:
            raise UserError(
                "task.options has neither train_file nor test_file: name a file of problems in one of them."
            )
        self._train = self._read(options.train_file) if options.train_file else []
        self._test = self._read(options.test_file) if options.test_file else []

    @classmethod
    @abstractmethod
    def problem(cls, line: Line, options: Any) -> Problem:
        """Returns what the line holds. Raises UserError, which begins with `line.where`, for a line that holds none."""

    def _read(self, path: str) -> list[Problem]:
        found: list[Problem] = []
        line_of: dict[str, int] = {}
        for line in read_lines(path, self.options.fields, self.example):
            problem = self._labelled(line)
            if problem.id in line_of:
                own = (
                    ""
                    if problem.id != str(line.number)
                    else ", which a line without an id has for its number"
                )
                raise UserError(
                    f"{line.where}: id {quoted(problem.id)} is that of line {line_of[problem.id]} too{own}; give it "
                    "its own."
                )
            line_of[problem.id] = line.number
            found.append(problem)
        if not found:
            raise UserError(f"{path} holds no problem: write one JSON object per line, {self.example}.")
        return found

    def _labelled(self, line: Line) -> Problem:
        problem = self.problem(line, self.options)
        labels = line.labels()
        return replace(problem, metadata=problem.metadata | labels) if labels else problem

    def train_problems(self) -> Sequence[Problem]:
        return self._train

    def test_problems(self) -> Sequence[Problem]:
        return self._test
