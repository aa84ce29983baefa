"""Whose solution and which feedback the teacher reads, and the presets: what others' options come to here.

A preset is a set of the options beside it; an option that is set takes the place of the preset's.
"""

from typing import Any, Literal

from pydantic import model_validator

from sdpo_megatron.algorithm.reprompt.template import Template
from sdpo_megatron.strict_yaml.section import Fraction, Positive, Section

_SOLVE = "Now solve the original question correctly."
_CLOSING = {"closing": _SOLVE, "closing_without_solution": _SOLVE}
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "own_success": "always",
        "feedback": "only_without_solution",
        "max_prompt_length": 10240,
        "template": {"layout": "user_turn", **_CLOSING},
    },
    "official": {
        "own_success": "never",
        "feedback": "only_without_solution",
        "max_prompt_length": 10240,
        "template": {"layout": "user_turn", **_CLOSING},
    },
    "recipe": {
        "own_success": "when_alone",
        "feedback": "always",
        "template": {"layout": "assistant_turn", **_CLOSING},
    },
}


class RepromptSettings(Section):
    preset: Literal["default", "paper", "official", "recipe"] = "default"
    """The values of options that are not set: `paper` as arXiv 2601.20802 describes it, `official` as its authors' code
    is configured, `recipe` as the tinker-cookbook's recipe does where it has feedback; `default` asks for an answer in
    the form of the solution shown, and has the defaults below."""
    success_reward_threshold: Fraction = 0.5
    own_success: Literal["never", "when_alone", "always"] = "never"
    """Whether a successful response may be its own demonstration: `never`, `when_alone` (only where no sibling
    succeeded), `always` (an attempt that succeeded is shown itself)."""
    solution: Literal["first", "random", "shortest"] = "first"
    """Which of the siblings' successful responses is shown. `random` draws one for each response, the same again in a
    resumed run; `shortest` collapses training."""
    feedback: Literal["always", "only_without_solution", "never"] = "only_without_solution"
    """When the feedback on the response's own failed attempt is shown."""
    show_attempt: bool = False
    """Whether that attempt is shown beside its feedback. The paper finds it harmful (table 6)."""
    max_prompt_length: Positive | None = None
    """The most tokens of a teacher's prompt; a longer one is shortened, its solution first. It never takes more than
    the response leaves of model.max_context_length, or half of that where it leaves less."""
    template: Template = Template()
    """The words around them. An environment that has its own takes no others."""

    @model_validator(mode="before")
    @classmethod
    def _with_its_preset(cls, values: Any) -> Any:
        name = values.get("preset", "default") if isinstance(values, dict) else None
        if not isinstance(name, str) or name not in PRESETS:
            return values
        preset = PRESETS[name]
        merged = {**preset, **values}
        template = values.get("template", {})
        if isinstance(template, dict) and "template" in preset:
            merged["template"] = {**preset["template"], **template}
        return merged

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> "RepromptSettings":
        if self.show_attempt and self.feedback == "never":
            raise ValueError(
                "reprompt.show_attempt shows an attempt beside its feedback, which reprompt.feedback=never shows "
                "nowhere; set another reprompt.feedback, or reprompt.show_attempt=false"
            )
        return self


def reprompt_warnings(settings: RepromptSettings) -> list[str]:
    """Returns what is to be said of the settings before training, a line each."""
    if settings.solution != "shortest":
        return []
    return [
        "reprompt.solution=shortest is known to collapse training: responses become shorter until none is right; "
        "random and first do not."
    ]
