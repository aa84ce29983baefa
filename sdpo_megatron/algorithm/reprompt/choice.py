"""Who is shown whose solution, and which feedback."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from sdpo_megatron.algorithm.reprompt.settings import RepromptSettings
from sdpo_megatron.records import Group, Hints


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the teacher of one response is told."""

    hints: Hints
    demonstration: int | None
    """Which response of the group the solution is; None where there is none."""


def choose(group: Group, settings: RepromptSettings, seed: str = "") -> list[Choice | None]:
    """Returns, for each of the G graded responses, what its teacher is told. `seed` decides, with the problem and the
    response, what `random` draws.

    It is None where the teacher would know nothing that the student did not: such a response gets no SDPO loss.
    """
    demonstrations = _demonstrations(group, settings)
    choices_G: list[Choice | None] = []
    graded_G = zip(group.places_G, group.rollouts_G, group.grades_G, strict=True)
    for g, (place, rollout, grade) in enumerate(graded_G):
        shown = _shown_to(g, demonstrations, settings, f"{seed} {group.problem.id} {place}")
        solution = None if shown is None else demonstrations[shown]
        failed = grade.reward < settings.success_reward_threshold
        wanted = {"always": True, "only_without_solution": solution is None, "never": False}
        feedback = grade.feedback if failed and wanted[settings.feedback] else ""
        attempt = rollout.text.strip() if feedback and settings.show_attempt else ""
        hints = Hints(solution=solution, feedback=feedback or None, attempt=attempt or None)
        known = solution is not None or feedback
        choices_G.append(Choice(hints=hints, demonstration=shown) if known else None)
    return choices_G


def _demonstrations(group: Group, settings: RepromptSettings) -> dict[int, str]:
    """The successful answers by index, as they would be shown; those with nothing to show are left out."""
    texts: dict[int, str] = {}
    for g, (rollout, grade) in enumerate(zip(group.rollouts_G, group.grades_G, strict=True)):
        text = rollout.text.strip()
        if grade.reward >= settings.success_reward_threshold and text:
            texts[g] = text
    return texts


def _shown_to(g: int, demonstrations: dict[int, str], settings: RepromptSettings, seed: str) -> int | None:
    """Returns which response the teacher of response `g` is shown."""
    if settings.own_success == "always" and g in demonstrations:
        return g
    others = [other for other in demonstrations if other != g]
    if others:
        return _one_of(others, demonstrations, settings, seed)
    return g if settings.own_success == "when_alone" and g in demonstrations else None


def _one_of(
    others: Sequence[int], demonstrations: dict[int, str], settings: RepromptSettings, seed: str
) -> int:
    if settings.solution == "random":
        return random.Random(f"demonstration {seed}").choice(others)
    if settings.solution == "shortest":
        return min(others, key=lambda other: len(demonstrations[other]))
    return others[0]
