"""The words that show a teacher what its student did not know, and in which turns they stand.

What the teacher is asked for is what the student learns to write. A prompt that asks to explain, or only "to solve",
makes a teacher that explains where its student answers, and takes probability from right answers.
"""

import re
from typing import Literal

from pydantic import ValidationInfo, field_validator, model_validator

from sdpo_megatron.records import Hints, Message, Problem
from sdpo_megatron.strict_yaml.section import Section

PLACEHOLDERS = ("question", "solution", "feedback", "attempt")
"""Each stands in the text of its own name, once."""
_PLACE = re.compile(r"\{\{([A-Za-z_]+)\}\}|\{([A-Za-z_]+)\}")
"""Words in two pairs of braces, which stand for themselves in one pair, or in one pair: a placeholder."""


class Template(Section):
    """The parts of the teacher's last turns, a blank line between two; an empty one is left out."""

    layout: Literal["user_turn", "assistant_turn"] = "user_turn"
    """Where solution, feedback and attempt stand: behind the question in its user turn, or in an assistant turn that a
    user turn with the closing words follows."""
    question: str = "{question}"
    """Text around the last user turn of the problem, which stands where {question} is."""
    solution: str = "Correct solution:\n\n{solution}"
    """Text around a solution, which stands where {solution} is."""
    feedback: str = "An earlier attempt at this did not succeed. It received this feedback:\n\n{feedback}"
    """Text around feedback, which stands where {feedback} is."""
    attempt: str = "That attempt was:\n\n{attempt}"
    """Text around the attempt that the feedback is about, which stands where {attempt} is."""
    closing: str = (
        "Now answer the original question in the form of the solution shown, and with nothing else."
    )
    """The last words where a solution is shown; empty for none."""
    closing_without_solution: str = "Now answer the original question correctly."
    """The last words where only feedback is shown; empty for none."""

    @field_validator(*PLACEHOLDERS, "closing", "closing_without_solution")
    @classmethod
    def _has_its_places(cls, text: str, info: ValidationInfo) -> str:
        key, places = f"reprompt.template.{info.field_name}", [found[2] for found in _PLACE.finditer(text)]
        for name in filter(None, places):
            if name not in PLACEHOLDERS:
                there_are = ", ".join(f"{{{known}}}" for known in PLACEHOLDERS)
                raise ValueError(
                    f"{key} holds {{{name}}}, which is no placeholder: there are {there_are}; write {{{{{name}}}}} for "
                    f"the characters {{{name}}}"
                )
            if name != info.field_name:
                raise ValueError(f"{key} holds {{{name}}}; write it in reprompt.template.{name} alone")
        count = places.count(info.field_name)
        if info.field_name in PLACEHOLDERS and count != 1:
            raise ValueError(
                f"{key} holds {{{info.field_name}}} {count} times; write it once, where it is to stand"
            )
        return text

    @model_validator(mode="after")
    def _ends_with_a_user_turn(self) -> "Template":
        for key in ("closing", "closing_without_solution"):
            if self.layout == "assistant_turn" and not getattr(self, key):
                raise ValueError(
                    f"reprompt.template.{key} is empty, but with reprompt.template.layout=assistant_turn it is the "
                    "turn that the response answers; write one, or set reprompt.template.layout=user_turn"
                )
        return self

    def show(self, problem: Problem, hints: Hints) -> list[Message]:
        """Returns the problem's messages with the last user turn extended, and the turns that follow it; system
        messages and earlier turns are kept."""
        question = _filled(self.question, problem.messages[-1]["content"])
        told = [
            _filled(text, value)
            for text, value in (
                (self.solution, hints.solution),
                (self.feedback, hints.feedback),
                (self.attempt, hints.attempt),
            )
            if value is not None
        ]
        last = self.closing_without_solution if hints.solution is None else self.closing
        closing = _filled(last, "")
        turns = (
            [Message(role="user", content=_paragraphs(question, *told, closing))]
            if self.layout == "user_turn"
            else [
                Message(role="user", content=question),
                Message(role="assistant", content=_paragraphs(*told)),
                Message(role="user", content=closing),
            ]
        )
        return [*problem.messages[:-1], *turns]


def _filled(text: str, value: str) -> str:
    """Whatever `value` holds stays as it is."""
    return _PLACE.sub(lambda found: f"{{{found[1]}}}" if found[1] else value, text)


def _paragraphs(*texts: str) -> str:
    return "\n\n".join(filter(None, texts))
