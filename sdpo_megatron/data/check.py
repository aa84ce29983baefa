"""A row as the environment reads it: what it refuses here, a run would refuse."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sdpo_megatron.envs import environment_class
from sdpo_megatron.envs.data.lines import Fields, Line
from sdpo_megatron.envs.from_files import FromFiles
from sdpo_megatron.envs.programs.cases import Suite
from sdpo_megatron.errors import ConfigError
from sdpo_megatron.records import Problem
from sdpo_megatron.strict_yaml.load import parse


class Checked(NamedTuple):
    """A row that its environment reads."""

    id: str
    text: str
    """What the model is asked; two rows with one text are one problem."""
    answer: str
    """What judges, for telling apart rows of one problem."""
    row: dict[str, Any]
    """What the environment reads of it, and domain and difficulty; as JSON."""


Checker = Callable[[Line], Checked]


def checker(env: str, options: Mapping[str, Any]) -> Checker:
    """Returns what reads rows as the environment of that name does. Raises ConfigError for one that reads no files, and
    for options that it has not."""
    environment = environment_class(env)
    if not issubclass(environment, FromFiles):
        raise ConfigError(f"--env {env} makes its problems itself, and reads no files; name another.")
    settings: Any = parse(environment.Options, {"train_file": "", **options}, {}, "--option")

    def check(line: Line) -> Checked:
        noting = _Noting(**vars(line))
        found = environment.problem(noting, settings)
        row = noting.rows[-1].model_dump(mode="json", exclude_unset=True)
        return Checked(found.id, *_text_and_answer(found), row | line.labels())

    return check


@dataclass(frozen=True)
class _Noting(Line):
    """A line that keeps what was read of it."""

    rows: list[Any] = field(default_factory=list)

    def fields(self, model: type[Fields]) -> Fields:
        self.rows.append(super().fields(model))
        return self.rows[-1]


def _text_and_answer(found: Problem) -> tuple[str, str]:
    tests = found.metadata.get("tests")
    if isinstance(tests, Suite):
        return found.messages[0]["content"], repr(tests)
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in found.messages), found.answer
