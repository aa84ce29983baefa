import pytest

from sdpo_megatron.algorithm.reprompt import RepromptSettings, Template
from sdpo_megatron.envs.equations import Equations, EquationsOptions
from sdpo_megatron.errors import ConfigError
from sdpo_megatron.records import Hints, Message, Problem
from tests.graders import answering

PROBLEM = Problem(
    id="12+34",
    messages=[
        Message(role="user", content="What is 23 + 41?"),
        Message(role="assistant", content="23 + 41 = 64"),
        Message(role="user", content="What is 58 + 17?"),
        Message(role="assistant", content="58 + 17 = 75"),
        Message(role="user", content="What is 12 + 34?"),
    ],
    answer="12 + 34 = 46",
    canonical=True,
)


def unordered(problem: Problem) -> tuple[int, int, str]:
    a, b = sorted((problem.metadata["a"], problem.metadata["b"]))
    return a, b, problem.metadata["operator"]


OPTIONS = [
    EquationsOptions(),
    EquationsOptions(digits=1, test_size=10),
    EquationsOptions(digits=1, test_size=42),
    EquationsOptions(digits=1, operators=["+", "-", "*", "+"], test_size=30),
    EquationsOptions(digits=2, operators=["-"]),
    EquationsOptions(digits=7, train_size=50, test_size=20, seed=3),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_held_out_pairs_are_trained_in_neither_order(options):
    environment = Equations(options)
    train, test = environment.train_problems(), environment.test_problems()
    assert len(test) == options.test_size and 0 < len(train) <= options.train_size
    assert not {unordered(p) for p in train} & {unordered(p) for p in test}
    assert len({unordered(p) for p in test}) == len(test)
    assert len({p.id for p in train}) == len(train)


@pytest.mark.parametrize("options", OPTIONS)
def test_problems_are_right_and_examples_are_never_asked(options):
    environment = Equations(options)
    for problem in [*environment.train_problems(), *environment.test_problems()]:
        a, b, operator = (problem.metadata[key] for key in ("a", "b", "operator"))
        assert len(str(a)) == len(str(b)) == options.digits
        assert operator != "-" or a >= b
        assert problem.messages[-1]["content"] == f"What is {a} {operator} {b}?"
        assert problem.answer == f"{a} {operator} {b} = {eval(f'{a} {operator} {b}')}"
        assert problem.canonical
        assert [m["role"] for m in problem.messages] == ["user", "assistant"] * 2 + ["user"]
        for example in problem.messages[1:-1:2]:
            left, mark, right, _, result = example["content"].split()
            assert mark == operator and int(result) == eval(f"{left} {mark} {right}")
            assert sorted((int(left), int(right))) != sorted((a, b))


def test_two_digit_sums_are_used_up():
    environment = Equations(EquationsOptions())
    swapped = {tuple(sorted((p.metadata["a"], p.metadata["b"]))) for p in environment.train_problems()}
    assert len(swapped) == 90 * 91 // 2 - 2 - 256
    both = [p for p in environment.train_problems() if p.metadata["a"] != p.metadata["b"]]
    assert all(f"{p.metadata['b']}+{p.metadata['a']}" in {q.id for q in both} for p in both[:50])


def test_the_prompt_is_the_one_that_was_measured():
    problem = next(p for p in Equations(EquationsOptions()).test_problems())
    assert problem.messages[:4] == PROBLEM.messages[:4]


def test_the_seed_decides():
    first, again, other = (Equations(EquationsOptions(seed=seed)).train_problems() for seed in (0, 0, 1))
    assert list(first) == list(again)
    assert [p.id for p in first] != [p.id for p in other]


def test_train_size_cuts_and_leaves_the_held_out_problems_alone():
    small = Equations(EquationsOptions(train_size=10))
    assert len(small.train_problems()) == 10
    assert not {unordered(p) for p in small.train_problems()} & {unordered(p) for p in small.test_problems()}


def test_too_many_held_out_problems():
    with pytest.raises(ConfigError) as error:
        Equations(EquationsOptions(digits=1, test_size=43))
    assert str(error.value) == (
        "task.options.test_size is 43, but there are only 43 equations with 1 digits besides the examples; "
        "set it to at most 42."
    )


def test_every_user_turn_of_the_teacher_has_its_solution_twice():
    messages = Equations(EquationsOptions()).show(PROBLEM, Hints(solution=" 12 + 34 = 46\n"), Template())
    assert [m["content"] for m in messages] == [
        "What is 23 + 41? Correct solution: 23 + 41 = 64\n23 + 41 = 64",
        "23 + 41 = 64",
        "What is 58 + 17? Correct solution: 58 + 17 = 75\n58 + 17 = 75",
        "58 + 17 = 75",
        "What is 12 + 34? Correct solution: 12 + 34 = 46\n12 + 34 = 46",
    ]
    assert PROBLEM.messages[0]["content"] == "What is 23 + 41?"


def test_feedback_is_shown_in_the_last_turn_only():
    environment = Equations(EquationsOptions())
    messages = environment.show(PROBLEM, Hints(feedback="Wrong."), Template())
    assert messages[:-1] == PROBLEM.messages[:-1]
    assert messages[-1]["content"] == "What is 12 + 34? Feedback on an earlier wrong answer: Wrong."
    both = environment.show(PROBLEM, Hints(solution="s", feedback="Wrong."), Template())[-1]["content"]
    assert both == ("What is 12 + 34? Feedback on an earlier wrong answer: Wrong. Correct solution: s\ns")


@pytest.mark.parametrize(
    ("feedback", "said"),
    [("none", [False, False]), ("form", [True, False]), ("mistake", [True, True])],
)
def test_feedback_is_given_on_demand(feedback, said):
    environment = Equations(EquationsOptions(feedback=feedback))
    grades = [environment.grade(PROBLEM, answering(text)) for text in ("46", "12 + 34 = 45")]
    assert [bool(grade.feedback) for grade in grades] == said
    grade = environment.grade(PROBLEM, answering("12 + 34 = 46"))
    assert grade.reward >= RepromptSettings().success_reward_threshold and not grade.feedback


BRACKETS = EquationsOptions(form="brackets", feedback="form")


def test_only_the_teachers_examples_have_the_brackets_that_are_asked_for():
    environment = Equations(BRACKETS)
    problem = environment.test_problems()[0]
    plain = Equations(EquationsOptions()).test_problems()[0]
    assert problem.messages == plain.messages and problem.answer == f"[{plain.answer}]"
    feedback = environment.grade(problem, answering(plain.answer)).feedback
    messages = environment.show(problem, Hints(feedback=feedback), Template())
    assert [m["content"] for m in messages[:4]] == [
        "What is 23 + 41?\nPut the equation in square brackets.",
        "[23 + 41 = 64]",
        "What is 58 + 17?\nPut the equation in square brackets.",
        "[58 + 17 = 75]",
    ]
    question = problem.messages[-1]["content"]
    assert messages[4]["content"] == f"{question}\nPut the equation in square brackets."
    told = environment.show(problem, Hints(solution=problem.answer), Template())
    assert told[0]["content"] == "What is 23 + 41? Correct solution: [23 + 41 = 64]\n[23 + 41 = 64]"
    assert told[1]["content"] == "[23 + 41 = 64]"
    assert told[4]["content"] == f"{question} Correct solution: {problem.answer}\n{problem.answer}"


def test_a_wrong_number_in_brackets_is_told_in_the_last_turn():
    environment = Equations(EquationsOptions(form="brackets", feedback="mistake"))
    problem = environment.test_problems()[0]
    feedback = environment.grade(problem, answering(problem.answer.replace("]", "0]"))).feedback
    assert feedback == "The number after the equals sign is wrong."
    messages = environment.show(problem, Hints(feedback=feedback), Template())
    assert messages[0] == problem.messages[0] and messages[1]["content"] == "[23 + 41 = 64]"
    assert messages[-1]["content"].endswith(f"? Feedback on an earlier wrong answer: {feedback}")
