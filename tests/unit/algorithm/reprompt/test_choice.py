"""Who is shown whose solution, which feedback, and which attempt."""

from collections import Counter
from dataclasses import replace

import pytest

from sdpo_megatron.algorithm.reprompt import RepromptSettings
from sdpo_megatron.algorithm.reprompt.choice import choose
from sdpo_megatron.records import Grade, Group, Hints, Message, Problem, Rollout

PROBLEM = Problem(id="p", messages=[Message(role="user", content="?")])


def rollout(text: str, thought: str = "") -> Rollout:
    return Rollout(
        prompt_ids=[1, 2],
        response_ids_T=[3],
        rollout_logprobs_T=[-0.5],
        loss_mask_T=[1],
        weight_spans=[],
        finish_reason="stop",
        text=text,
        thought=thought,
    )


def group(*graded: tuple[str, float, str]) -> Group:
    return Group(
        problem=PROBLEM,
        rollouts_G=[rollout(text) for text, _, _ in graded],
        grades_G=[Grade(reward=reward, feedback=feedback) for _, reward, feedback in graded],
    )


def shown(group: Group, seed: str = "", **settings) -> list[str | None]:
    choices = choose(group, RepromptSettings(**settings), seed)
    return [None if c is None else f"{c.hints.solution}|{c.hints.feedback}" for c in choices]


TWO_OF_FOUR = group(("a", 0, ""), ("b", 1, ""), ("c", 0.5, ""), ("d", 0.49, ""))
ONE_OF_THREE = group(("a", 0, ""), ("b", 1, ""), ("c", 0, ""))
MANY = group(*((f"answer {k:02}" + "!" * (k % 5), 1, "") for k in range(8)))


def test_demonstration_is_the_first_other_success():
    assert shown(TWO_OF_FOUR) == ["b|None", "c|None", "b|None", "b|None"]


@pytest.mark.parametrize(
    ("rule", "two", "one"),
    [("never", "c|None", None), ("when_alone", "c|None", "b|None"), ("always", "b|None", "b|None")],
)
def test_own_success_rule(rule, two, one):
    assert shown(TWO_OF_FOUR, own_success=rule)[1] == two
    assert shown(ONE_OF_THREE, own_success=rule) == ["b|None", one, "b|None"]


def test_always_shows_every_success_itself():
    assert shown(TWO_OF_FOUR, own_success="always") == ["b|None", "b|None", "c|None", "b|None"]


def test_threshold_decides_what_succeeds():
    assert shown(TWO_OF_FOUR, success_reward_threshold=0.49) == ["b|None", "c|None", "b|None", "b|None"]
    assert shown(TWO_OF_FOUR, success_reward_threshold=0.6) == ["b|None", None, "b|None", "b|None"]


@pytest.mark.parametrize("rule", ["never", "when_alone", "always"])
def test_nothing_is_known_where_nobody_succeeded_and_nothing_was_said(rule):
    assert shown(group(("a", 0, ""), ("b", 0, "")), own_success=rule) == [None, None]


def test_feedback_of_the_response_itself_by_rule():
    failed = group(("a", 0, "A"), ("b", 0, "B"), ("c", 0, ""))
    assert shown(failed) == ["None|A", "None|B", None]
    mixed = group(("a", 0, "A"), ("b", 1, "praise"))
    assert shown(mixed) == ["b|None", None]
    assert shown(mixed, feedback="always") == ["b|A", None]
    assert shown(mixed, feedback="always", own_success="always") == ["b|A", "b|None"]
    assert shown(failed, feedback="never") == [None, None, None]


def test_the_attempt_is_shown_beside_its_feedback_alone():
    graded = group((" a ", 0, "A"), ("b", 1, ""), ("c", 0, ""), ("", 0, "D"))
    settings = RepromptSettings(show_attempt=True, feedback="always", own_success="always")
    told = [choice.hints if choice else None for choice in choose(graded, settings)]
    assert told == [
        Hints(solution="b", feedback="A", attempt="a"),
        Hints(solution="b"),
        Hints(solution="b"),
        Hints(solution="b", feedback="D"),
    ]
    without = [choice.hints.attempt if choice else None for choice in choose(graded, RepromptSettings())]
    assert without == [None] * 4


def test_a_success_without_an_answer_is_no_demonstration():
    """Whatever its reward: a threshold of 0 makes a success of everything."""
    no_answer = group(("", 0, ""), ("x", 0, ""), ("b", 0, ""))
    assert shown(no_answer, success_reward_threshold=0.0)[2] == "x|None"


def test_neither_demonstration_nor_attempt_holds_a_thought():
    graded = group(("4", 1, ""), ("5", 0, "wrong"))
    thoughtful = replace(graded, rollouts_G=[replace(r, thought="hm") for r in graded.rollouts_G])
    settings = RepromptSettings(feedback="always", show_attempt=True)
    choice = choose(thoughtful, settings)[1]
    assert choice is not None and choice.hints == Hints(solution="4", feedback="wrong", attempt="5")


def test_the_shortest_of_the_others_is_shown():
    lengths = group(("long answer", 1, ""), ("short", 1, ""), ("brief", 1, ""), ("x", 0, ""))
    assert shown(lengths, solution="shortest") == ["short|None", "brief|None", "short|None", "short|None"]


def test_a_random_solution_is_drawn_for_each_response_and_again_the_same():
    drawn = shown(MANY, seed="7 3", solution="random")
    assert drawn == shown(MANY, seed="7 3", solution="random")
    assert len(set(drawn)) > 2 and all(f"answer {g:02}" not in (text or "") for g, text in enumerate(drawn))
    elsewhere = [
        shown(MANY, seed="8 3", solution="random"),
        shown(MANY, seed="7 4", solution="random"),
        shown(replace(MANY, problem=replace(PROBLEM, id="q")), seed="7 3", solution="random"),
    ]
    assert all(other != drawn for other in elsewhere)


def test_random_solutions_are_drawn_evenly():
    counts = Counter(shown(MANY, seed=str(step), solution="random")[0] for step in range(1400))
    assert len(counts) == 7 and min(counts.values()) > 150 and max(counts.values()) < 250
