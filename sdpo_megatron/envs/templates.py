"""The words that show a teacher what its student did not know: presets, and a user's own.

What the teacher is asked for is what the student learns to write. A prompt that asks to explain, or only "to solve",
makes a teacher that explains where its student answers, and takes probability from right answers.
"""

from dataclasses import dataclass, replace
from typing import Literal

from pydantic import ValidationInfo, field_validator

from sdpo_megatron.config import Section
from sdpo_megatron.records import Message, Problem


@dataclass(frozen=True)
class Template:
    """The parts of the last user turn behind the question, a blank line before each; an empty one is left out."""

    solution: str
    """Holds {solution}."""
    feedback: str
    """Holds {feedback}."""
    closing: str
    """The last words where a solution is shown."""
    closing_without_solution: str
    """The last words where only feedback is."""

    def show(self, problem: Problem, solution: str | None, feedback: str | None) -> list[Message]:
        """Returns the problem's messages with the last user turn extended; system messages and earlier turns are
        kept. At least one of `solution` and `feedback` is given."""
        parts = [problem.messages[-1]["content"]]
        if solution is not None:
            parts.append(self.solution.replace("{solution}", solution))
        if feedback is not None:
            parts.append(self.feedback.replace("{feedback}", feedback))
        parts.append(self.closing_without_solution if solution is None else self.closing)
        return [*problem.messages[:-1], Message(role="user", content="\n\n".join(filter(None, parts)))]


PAPER = Template(
    solution="Correct solution:\n\n{solution}",
    feedback="An earlier attempt at this did not succeed. It received this feedback:\n\n{feedback}",
    closing="Now solve the original question correctly.",
    closing_without_solution="Now solve the original question correctly.",
)
DEFAULT = replace(
    PAPER,
    closing="Now answer the original question in the form of the solution shown, and with nothing else.",
    closing_without_solution="Now answer the original question correctly.",
)
TEMPLATES: dict[str, Template] = {"default": DEFAULT, "paper": PAPER}


class TemplateSettings(Section):
    name: Literal["default", "paper"] = "default"
    """`default` asks for an answer in the form of the solution shown, `paper` to solve the question, as arXiv
    2601.20802 does. The texts below take the place of a preset's."""
    solution: str | None = None
    """Text around a solution, which stands where {solution} is."""
    feedback: str | None = None
    """Text around feedback, which stands where {feedback} is."""
    closing: str | None = None
    """The last words where a solution is shown; empty for none."""
    closing_without_solution: str | None = None
    """The last words where only feedback is shown; empty for none."""

    @field_validator("solution", "feedback", "closing", "closing_without_solution")
    @classmethod
    def _has_its_places(cls, text: str | None, info: ValidationInfo) -> str | None:
        for name in ("solution", "feedback"):
            place, due = f"{{{name}}}", int(name == info.field_name)
            found = due if text is None else text.count(place)
            if found != due:
                raise ValueError(
                    f"task.options.template.{info.field_name} holds {place} {found} times; write it "
                    f"{'once, where it is to stand' if due else f'in template.{name} alone'}"
                )
        return text

    def template(self) -> Template:
        """Returns the preset with the own texts in the place of its own."""
        own = self.model_dump(exclude={"name"}, exclude_none=True)
        return replace(TEMPLATES[self.name], **own)
