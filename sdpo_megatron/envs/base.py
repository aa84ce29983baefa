"""What an environment is, and how one of them, or another member of a registry, is found by its name."""

import difflib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from sdpo_megatron.algorithm.reprompt import Template
from sdpo_megatron.errors import ConfigError
from sdpo_megatron.records import Grade, Hints, Message, Problem, Rollout
from sdpo_megatron.strict_yaml.section import Section

if TYPE_CHECKING:
    # numpy comes with it
    from sdpo_megatron.run_dir.records_file import RecordedResponse

Member = TypeVar("Member")


@dataclass(frozen=True, kw_only=True)
class Part:
    """A piece of a response as a report shows it. It is text: nothing in it is markup, whatever it looks like."""

    kind: Literal["text", "code", "json"]
    title: str
    text: str


class Environment(ABC):
    """A task: what it asks, how it judges, and how it shows the teacher what the student did not know.

    It is built twice, in rank 0 for its problems and in the process whose forks grade (envs/grading/host.py): building
    it must not depend on anything but its options and the files that they name.
    """

    Options: ClassVar[type[Section]]
    """Says what `task.options` may hold; its instance is what the class is built from."""
    grade_limit_s: float = 60.0
    """Seconds after which a grader is killed, unless `grading.limit_s` says otherwise; may follow from the options."""
    slow_grade: ClassVar[Grade | None] = None
    """The grade of a response whose grader was killed for its time, where that is the response's own fault; None leaves
    the response out of the loss."""
    most_at_once: ClassVar[int | None] = None
    """Responses that may be graded at a time, where that is less than `grading.num_workers`: as many as there are cores
    for a grader that keeps one busy and measures time."""

    judged_by: ClassVar[Sequence[str]] = ()
    """The distributions whose versions decide a grade, for the ruler of an evaluation (envs/version.py)."""
    options: Any = None
    """What it was built from, where its class keeps that."""

    def __init__(self, options: Any) -> None:  # noqa: B027
        """Raises UserError for options that are impossible together, and for data that cannot be read."""

    @abstractmethod
    def train_problems(self) -> Sequence[Problem]: ...

    def test_problems(self) -> Sequence[Problem]:
        """Held-out problems; may be empty."""
        return []

    @abstractmethod
    def grade(self, problem: Problem, rollout: Rollout) -> Grade:
        """Judges a response that came to an answer, `rollout.text`.

        Called in the main thread of a process of its own, one response at a time. Raises GradingFault where the
        infrastructure failed: that is tried again. That, any other exception and a reward outside [0, 1] leave the
        response out of the loss; the run warns and goes on."""

    def answer_key(self, problem: Problem) -> str:
        """Returns what the grader compares with, as text: evaluations that differ in it do not compare."""
        return json.dumps([problem.answer, problem.grader, problem.metadata], sort_keys=True, default=str)

    def warm_up(self) -> None:  # noqa: B027
        """Does once, before the first grade, what would slow each grader's first: imports, say."""

    def show(self, problem: Problem, hints: Hints, template: Template) -> list[Message]:
        """Returns the teacher's conversation. An environment that has its own words for it has no use for the
        template's, and a run that sets some is refused. It is asked again with shorter hints where a prompt is too
        long."""
        return template.show(problem, hints)

    @classmethod
    def render(cls, response: "RecordedResponse") -> list[Part]:
        """Returns what a report shows of an answer, from its record alone: no options, no data and no model are at
        hand. What it raises is a note at that response."""
        return [Part(kind="text", title="Answer", text=response.response)]


def look_up(kind: str, name: str, registry: Mapping[str, Member]) -> Member:
    """Returns the member of that name, or raises a ConfigError that lists all names and the nearest."""
    if name in registry:
        return registry[name]
    close = difflib.get_close_matches(name, registry, n=1)
    meant = f" Did you mean '{close[0]}'?" if close else ""
    raise ConfigError(f"There is no {kind} '{name}'.{meant} There are: {', '.join(sorted(registry))}.")
