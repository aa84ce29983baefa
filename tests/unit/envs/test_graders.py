import pytest

from sdpo_megatron.envs.graders import GRADERS, unanswerable
from sdpo_megatron.records import Message, Problem


def problem(answer: str) -> Problem:
    return Problem(id="p", messages=[Message(role="user", content="?")], answer=answer)


@pytest.mark.parametrize(
    ("text", "reward", "correct_format"),
    [
        ("23 + 41 = 64", 1, True),
        ("  23 + 41 = 64\n", 1, True),
        ("23 + 41 = 65", 0, True),
        ("41 + 23 = 64", 0, True),
        ("23 + 41 = 64.", 0, False),
        ("23 + 41 = 64 apples", 0, False),
        ("23 + 41 = 64\n23 + 41 = 64", 0, False),
        ("23+41=64", 0, False),
        ("64", 0, False),
        ("", 0, False),
        ("２３ + 41 = 64", 0, False),
    ],
)
def test_equation(text, reward, correct_format):
    grade = GRADERS["equation"](problem("23 + 41 = 64"), text)
    assert (grade.reward, grade.correct_format) == (reward, correct_format)
    assert bool(grade.feedback) == (reward == 0)
    assert "64" not in grade.feedback


@pytest.mark.parametrize(
    ("text", "feedback", "correct_format"),
    [
        (" [23 + 41 = 64]\n", "", True),
        ("23 + 41 = 64", "Put the equation in square brackets.", False),
        ("[23 + 41 = 64", "nothing else", False),
        ("[23 + 41 = 64] and", "nothing else", False),
        ("[sixty-four]", "nothing else", False),
        ("[[23 + 41 = 64]]", "nothing else", False),
        ("[23 + 41 = 65]", "The number", True),
        ("[41 + 23 = 64]", "other numbers", True),
    ],
)
def test_equation_in_brackets(text, feedback, correct_format):
    grade = GRADERS["equation"](problem("[23 + 41 = 64]"), text)
    assert (grade.reward, grade.correct_format) == (float(not feedback), correct_format)
    assert feedback in grade.feedback and bool(feedback) == bool(grade.feedback)


def test_white_space_round_the_answer_of_an_equation_does_not_count():
    assert GRADERS["equation"](problem("1 + 1 = 2\n"), "1 + 1 = 2").reward == 1.0


def test_exact():
    assert GRADERS["exact"](problem("a b"), " a b\n").reward == 1
    assert GRADERS["exact"](problem("a b"), "a  b").reward == 0
    assert GRADERS["exact"](problem("A"), "a").reward == 0


@pytest.mark.parametrize(
    ("answer", "text", "reward", "correct_format"),
    [
        ("4", "2 + 2 = 4", 1, True),
        ("4", "It is 4.", 1, True),
        ("4", "4 or maybe 5", 0, True),
        ("#### 1,234", "1234.0", 1, True),
        ("1234567", "It is 1,234,567 in all", 1, True),
        ("-3", "x = -3", 1, True),
        ("3", "10-3", 1, True),
        ("-3", "3", 0, True),
        ("0.5", "about 0.50", 1, True),
        ("64", "64,", 1, True),
        ("5000", "5e3", 1, True),
        ("5", "5e3", 0, True),
        ("0.5", ".5", 1, True),
        ("-0.5", "it is -.5", 1, True),
        ("5", ".5", 0, True),
        ("4", "2e", 0, True),
        ("4", "four", 0, False),
        ("4", "", 0, False),
    ],
)
def test_last_number(answer, text, reward, correct_format):
    grade = GRADERS["last_number"](problem(answer), text)
    assert (grade.reward, grade.correct_format) == (reward, correct_format)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("\u22125", "-5"),
        ("5 \u2212 3", "3"),
        ("1{,}000", "1000"),
        ("1\\,000{,}000", "1000000"),
        ("½", "0.5"),
        ("2½", "2.5"),
        ("\u2212½", "-.5"),
        (r"\frac{1}{2}", ".5"),
        (r"$-\dfrac{3}{4}$", "-0.75"),
        (r"\frac12", "1/2"),
        ("1/2", "0.5"),
        ("it is -1/3.", r"-\frac{1}{3}"),
        ("2/6", "1/3"),
        (r"\boxed{\frac{7}{-2}}", "-3.5"),
        ("on 10/05/2024", "2024"),
        ("1/0", "1"),
        ("12,34", "34"),
    ],
)
def test_a_number_has_the_same_value_however_it_is_written(written: str, value: str):
    for one, other in ((written, value), (value, written)):
        if unanswerable("last_number", one) is None:
            assert GRADERS["last_number"](problem(one), other).reward == 1, (one, other)
    assert GRADERS["last_number"](problem("7"), written).reward == 0


def test_a_wrong_fraction_is_repeated_as_it_is():
    grade = GRADERS["last_number"](problem("4"), "2/6")
    assert (grade.feedback, grade.answer) == ("1/3 is wrong.", "1/3")
    assert GRADERS["last_number"](problem("4"), "1/2").answer == "0.5"


@pytest.mark.parametrize("answer", ["3 of 4", "1 000", "2 + 2 = 4", "1; 2"])
def test_an_answer_of_several_numbers_is_refused(answer: str):
    assert unanswerable("last_number", answer) == (
        "the grader last_number compares with one number, but this answer holds several; leave the right one, or name "
        "another grader."
    )


def test_what_the_feedback_repeats_of_a_number_is_short():
    assert GRADERS["last_number"](problem("4"), "5").feedback == "5 is wrong."
    assert GRADERS["last_number"](problem("4"), "9" * 400_000).feedback == "The last number is wrong."


@pytest.mark.parametrize("name", sorted(GRADERS))
@pytest.mark.parametrize(
    "text",
    [
        "\x00",
        "=" * 10_000,
        "9" * 10_000,
        "1,2,3,",
        "\ud800",
        "- . ,",
        "٣",
        "1e999",
        "1e9999999999",
        ".e5",
        "." * 10_000,
    ],
)
def test_graders_never_raise(name, text):
    assert GRADERS[name](problem("4"), text).reward == 0
