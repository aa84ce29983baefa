"""What environments share whose problems lie in files of JSON lines."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from sdpo_megatron.config import Section
from sdpo_megatron.envs.base import Environment
from sdpo_megatron.envs.data.json_lines import Line, read_problems
from sdpo_megatron.records import Problem


class FileOptions(Section):
    train_file: str
    test_file: str | None = None
    """Held-out problems; without it there are none."""


class FromFiles(Environment):
    """A subclass says what a line is, and judges. Its Options derive from FileOptions."""

    Options: ClassVar[Any] = FileOptions
    example: ClassVar[str]
    """A line as messages show it."""

    def __init__(self, options: Any) -> None:
        """Raises UserError, with file and line, for a file that is missing, empty or malformed."""
        self.options = options
        self._train = read_problems(options.train_file, self.problem, self.example)
        self._test = read_problems(options.test_file, self.problem, self.example) if options.test_file else []

    @abstractmethod
    def problem(self, line: Line) -> Problem:
        """Raises UserError, which begins with `line.where`, for a line that holds none."""

    def train_problems(self) -> Sequence[Problem]:
        return self._train

    def test_problems(self) -> Sequence[Problem]:
        return self._test
