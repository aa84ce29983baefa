"""A teacher's prompt that is too long: the solution is shortened first, then the attempt, then the feedback; never the
question nor the closing words."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from sdpo_megatron.records import Hints

_FIRST_TO_GO = ("solution", "attempt", "feedback")
CUT = "\n[...]\n"
"""Stands where the middle of a text was: its beginning shows the form, its end the result."""
LEAST = 64
"""Characters of which less would say nothing: a text that has to be shorter is left out."""
_TRIES, _SLACK = 5, 8
"""Prompts that are tokenised to find a length at most, and tokens that may stay unused."""

PromptOf = Callable[[Hints], list[int]]
"""The tokenised prompt that tells a teacher so much."""


@dataclass(frozen=True)
class Fitted:
    hints: Hints
    """What is left of the hints."""
    prompt_ids: list[int]


def fit(hints: Hints, limit: int, prompt_of: PromptOf) -> Fitted | None:
    """Returns the hints, shortened where need be, whose prompt has at most `limit` tokens; None where nothing is left
    of them that the student does not know. A text that cannot be shortened enough is left out, and the next one is
    shortened."""
    ids = prompt_of(hints)
    for part in _FIRST_TO_GO:
        if len(ids) <= limit:
            break
        text = getattr(hints, part)
        if text is None:
            continue
        shortened = _shortened(hints, part, text, len(ids), limit, prompt_of)
        if shortened is not None:
            return shortened
        hints = replace(hints, **{part: None})
        if hints.solution is None and hints.feedback is None:
            return None
        ids = prompt_of(hints)
    return Fitted(hints, ids) if len(ids) <= limit else None


def _shortened(
    hints: Hints, part: str, text: str, tokens: int, limit: int, prompt_of: PromptOf
) -> Fitted | None:
    """Keeps as much of the text as fits; None where LEAST characters do not. The length is found by interpolation,
    since a text has about as many tokens in each of its parts."""

    def kept(characters: int) -> Fitted:
        end = len(text) - characters // 2
        short = replace(hints, **{part: text[: characters - characters // 2] + CUT + text[end:]})
        return Fitted(short, prompt_of(short))

    if len(text) <= LEAST:
        return None
    low, high, best = LEAST, len(text), kept(LEAST)
    if len(best.prompt_ids) > limit:
        return None
    for _ in range(_TRIES):
        spare = limit - len(best.prompt_ids)
        if spare <= _SLACK or high - low <= 1:
            break
        middle = low + spare * (high - low) // (tokens - len(best.prompt_ids))
        middle = min(max(middle, low + 1), high - 1)
        tried = kept(middle)
        if len(tried.prompt_ids) <= limit:
            low, best = middle, tried
        else:
            high, tokens = middle, len(tried.prompt_ids)
    return best
