from dataclasses import replace

from sdpo_megatron.problems import ProblemOrder, canonical, evaluated
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


def test_an_evaluation_without_held_out_problems_takes_those_of_training():
    one, two = (Problem(id=name, messages=[Message(role="user", content=name)]) for name in "ab")
    assert evaluated([one, two], [two], 1) == [one]
    assert evaluated([], [two, one], 5) == [two, one]
    assert canonical([one, replace(two, canonical=True)]) == [replace(two, canonical=True)]
