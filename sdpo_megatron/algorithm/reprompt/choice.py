"""Who is shown whose solution, and which feedback."""

import random
from collections.abc import Mapping
from dataclasses import dataclass

from sdpo_megatron.algorithm.reprompt.settings import RepromptSettings
from sdpo_megatron.records import Group, Hints


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the teacher of one response is told."""

    hints: Hints
    demonstration: int | None
    """The place among the G responses of the one that the solution is; None where there is none."""


def choose(group: Group, settings: RepromptSettings, seed: str = "") -> list[Choice | None]:
    """Returns, for each of the G graded responses, what its teacher is told. `seed` decides, with the problem and the
    response, what `random` draws.

    It is None where the teacher would know nothing that the student did not: such a response gets no SDPO loss.
    """
    threshold = settings.success_reward_threshold
    graded_G = [*zip(group.places_G, group.rollouts_G, group.grades_G, strict=True)]
    # what is successful and has something to show, as it would be shown
    answers = {
        place: text
        for place, rollout, grade in graded_G
        if grade.reward >= threshold and (text := rollout.text.strip())
    }
    choices_G: list[Choice | None] = []
    for place, rollout, grade in graded_G:
        shown = _shown_to(place, answers, settings, f"{seed} {group.problem.id} {place}")
        solution = None if shown is None else answers[shown]
        wanted = {"always": True, "only_without_solution": solution is None, "never": False}
        feedback = grade.feedback if grade.reward < threshold and wanted[settings.feedback] else ""
        attempt = rollout.text.strip() if feedback and settings.show_attempt else ""
        hints = Hints(solution=solution, feedback=feedback or None, attempt=attempt or None)
        known = solution is not None or feedback
        choices_G.append(Choice(hints=hints, demonstration=shown) if known else None)
    return choices_G


def _shown_to(place: int, answers: Mapping[int, str], settings: RepromptSettings, seed: str) -> int | None:
    """Returns the place of the response that the teacher of the one at `place` is shown."""
    own = place if place in answers else None
    if settings.own_success == "always" and own is not None:
        return own
    others = [other for other in answers if other != place]
    if not others:
        return own if settings.own_success == "when_alone" else None
    if settings.solution == "random":
        return random.Random(f"demonstration {seed}").choice(others)
    if settings.solution == "shortest":
        return min(others, key=lambda other: len(answers[other]))
    return others[0]
