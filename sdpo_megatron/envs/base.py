"""What an environment is, and how one is looked up by name."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

from sdpo_megatron.algorithm.reprompt import Template
from sdpo_megatron.errors import ConfigError
from sdpo_megatron.records import Grade, Hints, Message, Problem

Member = TypeVar("Member")


class Environment(Protocol):
    """A task: what it asks, how it judges, and how it shows the teacher what the student did not know."""

    Options: ClassVar[Any]
    """The config.Section that says what `task.options` may hold; its instance is what the class is built
    from."""

    def __init__(self, options: Any) -> None:
        """Raises UserError for options that are impossible together, and for data that cannot be read."""
        ...

    def train_problems(self) -> Sequence[Problem]: ...

    def test_problems(self) -> Sequence[Problem]:
        """Held-out problems; may be empty."""
        ...

    def grade(self, problem: Problem, text: str) -> Grade:
        """Judges an answer, decoded without thoughts and special tokens. Never raises for anything a model may
        write. Called in a thread of its own while other responses are sampled, one response at a time."""
        ...

    def show(self, problem: Problem, hints: Hints, template: Template) -> list[Message]:
        """Returns the teacher's conversation. An environment that has its own words for it has no use for the
        template's, and a run that sets some is refused. It is asked again with shorter hints where a prompt is too
        long."""
        return template.show(problem, hints)


def look_up(kind: str, name: str, registry: Mapping[str, Member]) -> Member:
    """Returns the member of that name, or raises a ConfigError that lists all names and the nearest."""
    if name in registry:
        return registry[name]
    close = difflib.get_close_matches(name, registry, n=1)
    meant = f" Did you mean '{close[0]}'?" if close else ""
    raise ConfigError(f"There is no {kind} '{name}'.{meant} There are: {', '.join(sorted(registry))}.")
