from typing import Any

import pytest

from sdpo_megatron.errors import UserError
from sdpo_megatron.problems import ProblemOrder, canonical, check_answers_fit, check_prompts_fit
from sdpo_megatron.records import Message, Problem


def test_an_epoch_asks_every_problem_once():
    order = ProblemOrder(12, seed=0, per_step=4)
    for epoch in range(3):
        steps = [order.indices(epoch * 3 + k) for k in range(3)]
        assert sorted(i for step in steps for i in step) == list(range(12))


def test_a_step_depends_on_nothing_but_its_number():
    order = ProblemOrder(50, seed=7, per_step=8)
    forwards = [order.indices(step) for step in range(40)]
    fresh = [ProblemOrder(50, seed=7, per_step=8).indices(step) for step in reversed(range(40))]
    assert forwards == fresh[::-1]


def test_no_step_asks_a_problem_twice():
    order = ProblemOrder(10, seed=1, per_step=4)
    for step in range(30):
        assert len(set(order.indices(step))) == 4


def test_epochs_and_seeds_differ():
    order = ProblemOrder(100, seed=0, per_step=100)
    assert order.indices(0) != order.indices(1)
    assert order.indices(0) != ProblemOrder(100, seed=1, per_step=100).indices(0)


def test_what_is_skipped_at_the_end_of_an_epoch_is_not_always_the_same():
    order = ProblemOrder(10, seed=0, per_step=4)
    asked = [{i for k in (0, 1) for i in order.indices(2 * epoch + k)} for epoch in range(6)]
    assert len({frozenset(epoch) for epoch in asked}) > 1


def test_too_few_problems():
    with pytest.raises(UserError) as error:
        ProblemOrder(5, seed=0, per_step=8)
    assert str(error.value) == (
        "rollout.problems_per_step is 8, but there are 5 training problems: "
        "set it to at most 5 or add problems."
    )


def test_prompts_that_leave_no_room_are_named_at_the_start():
    def problem(name: str, words: int) -> Problem:
        return Problem(id=name, messages=[Message(role="user", content="word " * words)])

    tokenised: list[int] = []

    def prompt_ids(messages: list[Message], tools: list[dict[str, Any]]) -> list[int]:
        tokenised.append(len(messages[0]["content"].split()))
        return [0] * (tokenised[-1] + 3)

    check_prompts_fit([problem("a", 10), problem("b", 96)], prompt_ids, 100)
    assert tokenised == [0, 10, 96]
    with pytest.raises(UserError) as error:
        check_prompts_fit([problem("a", 10), problem("b", 97), problem("c", 120)], prompt_ids, 100)
    assert str(error.value) == (
        "2 of 3 problems leave no room for a response in model.max_context_length=100: the longest prompt, of c, "
        "has 123 tokens; raise model.max_context_length, or leave these problems out."
    )
    tokenised.clear()
    check_prompts_fit([problem("short", 10)] * 1000, prompt_ids, 1000)
    assert tokenised == [0]


def test_canonical_answers_that_do_not_fit_are_named_at_the_start():
    def problem(name: str, words: int, canonical: bool = True) -> Problem:
        question = [Message(role="user", content="why " * 10)]
        return Problem(id=name, messages=question, answer="word " * words, canonical=canonical)

    def prompt_ids(messages: list[Message], tools: list[dict[str, Any]]) -> list[int]:
        return [0] * (len(messages[0]["content"].split()) + 3)

    def answer_ids(text: str) -> list[int]:
        return [0] * (len(text.split()) + 1)

    def check(*problems: Problem) -> None:
        check_answers_fit(canonical(problems), prompt_ids, answer_ids, 100)

    check(problem("a", 3), problem("b", 86), problem("c", 87, canonical=False))
    with pytest.raises(UserError) as error:
        check(problem("a", 3), problem("b", 87))
    assert str(error.value) == (
        "Problem b and its canonical answer have 101 tokens, more than model.max_context_length=100; raise that, or "
        "leave the problem out."
    )
