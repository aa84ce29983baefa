"""Prompts that are too long, with a real chat template: what is shortened, in which order, and at which cost."""

import random

import pytest

from sdpo_megatron.algorithm.reprompt import PRESETS, RepromptSettings
from sdpo_megatron.algorithm.reprompt.fitting import CUT, LEAST, Fitted, fit
from sdpo_megatron.chat import Chat
from sdpo_megatron.records import Hints, Message, Problem
from tests.tiny_model import make_tokenizer

CHAT = Chat(make_tokenizer())
QUESTION = "A question whose every word counts, and which nobody may shorten? "
PROBLEM = Problem(id="p", messages=[Message(role="user", content=QUESTION * 3)])
DICE = random.Random(0)
LONG = " ".join(DICE.choice(("return", "self", "x", "raise ValueError", "§§", "0.125")) for _ in range(900))
SOLUTION, FEEDBACK, ATTEMPT = f"BEGIN {LONG} RESULT", f"ERROR {LONG} INPUT", f"def {LONG} pass"


class Teacher:
    """Tokenises its prompts, and counts them."""

    def __init__(self, preset: str = "default"):
        self.template = RepromptSettings(preset=preset).template  # type: ignore[arg-type]
        self.calls = 0

    def __call__(self, hints: Hints) -> list[int]:
        self.calls += 1
        return CHAT.prompt_ids(self.template.show(PROBLEM, hints))


def fitted(teacher: Teacher, hints: Hints, limit: int) -> Fitted:
    found = fit(hints, limit, teacher)
    assert found is not None and len(found.prompt_ids) <= limit
    return found


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("limit", [250, 600, 1500])
def test_the_demonstration_is_shortened_never_the_question_nor_the_closing_words(preset: str, limit: int):
    teacher = Teacher(preset)
    hints = Hints(solution=SOLUTION, feedback="Wrong sign.")
    found = fitted(teacher, hints, limit)
    assert limit - len(found.prompt_ids) <= 16, "about all that fits is used"
    assert found.hints.feedback == hints.feedback
    assert found.hints.solution is not None
    assert found.hints.solution.startswith("BEGIN") and found.hints.solution.endswith("RESULT")
    assert found.hints.solution.count(CUT) == 1
    text = CHAT.decode_all(found.prompt_ids)
    assert QUESTION * 3 in text and teacher.template.closing in text
    assert text.endswith("<|im_start|>assistant\n")
    assert teacher.calls <= 7


def test_what_fits_stays_as_it_is():
    hints = Hints(solution="4", feedback="no", attempt="5")
    whole = len(Teacher()(hints))
    teacher = Teacher()
    assert fitted(teacher, hints, whole).hints == hints and teacher.calls == 1
    # a text of so few characters says nothing with its middle cut out
    assert fitted(Teacher(), hints, whole - 1).hints == Hints(feedback="no", attempt="5")


def test_the_attempt_goes_before_the_feedback():
    hints = Hints(solution=SOLUTION, feedback=FEEDBACK, attempt=ATTEMPT)
    room_for_both = len(Teacher()(Hints(feedback=FEEDBACK))) + 150
    found = fitted(Teacher(), hints, room_for_both).hints
    assert found.solution is None and found.feedback == FEEDBACK
    assert found.attempt is not None and found.attempt.startswith("def") and CUT in found.attempt
    least = fitted(Teacher(), hints, 250).hints
    assert (least.solution, least.attempt) == (None, None)
    assert least.feedback is not None and least.feedback.endswith("INPUT") and CUT in least.feedback


@pytest.mark.parametrize(
    "hints", [Hints(solution=SOLUTION), Hints(feedback=FEEDBACK), Hints(feedback="no", attempt=ATTEMPT)]
)
def test_where_nothing_fits_there_is_no_teacher(hints: Hints):
    assert fit(hints, len(Teacher()(Hints())) - 1, Teacher()) is None


def test_an_environments_own_words_are_asked_again():
    def copies(hints: Hints) -> list[int]:
        return CHAT.prompt_ids([Message(role="user", content=f"{hints.solution}\n{hints.solution}")])

    found = fit(Hints(solution=SOLUTION), 400, copies)
    assert found is not None and 380 < len(found.prompt_ids) <= 400
    assert fit(Hints(solution=SOLUTION), 400, lambda hints: list(range(401))) is None


def test_the_middle_is_cut_and_the_length_found_in_few_tries():
    calls = []

    def characters(hints: Hints) -> list[int]:
        calls.append(hints)
        return list(range(len(hints.solution or "")))

    text = "".join(chr(200 + k % 500) for k in range(100_000))
    found = fit(Hints(solution=text), 5_000, characters)
    assert found is not None and found.hints.solution is not None
    head, tail = found.hints.solution.split(CUT)
    assert text.startswith(head) and text.endswith(tail) and 0 <= len(head) - len(tail) <= 1
    assert 4_990 <= len(found.prompt_ids) <= 5_000 and len(calls) <= 4
    assert fit(Hints(solution=text), LEAST + len(CUT), characters) is not None
    assert fit(Hints(solution=text), LEAST + len(CUT) - 1, characters) is None
