"""How outputs are compared, and what is told of a failure: which, in which form, how much, and what never."""

import json

import pytest

from sdpo_megatron.envs.programs.cases import Case
from sdpo_megatron.envs.programs.feedback import feedback_on
from sdpo_megatron.envs.programs.results import Result, results_of, same_text, same_value
from sdpo_megatron.envs.sandbox.base import Outcome


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("3\n", "3", True),
        ("1 2\n3", "1\n2 3\n\n", True),
        ("1.50", "1.5", True),
        ("1e3", "1000", True),
        ("3", "4", False),
        ("3 3", "3", False),
        ("", "3", False),
        ("nan", "nan", True),
        ("inf", "1e999", False),
        ("yes", "YES", False),
        ("0x10", "16", False),
    ],
)
def test_texts(printed, expected, same):
    assert same_text(printed, expected) == same


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [
        (3, 3, True),
        (3, 3.0, True),
        (0.1 + 0.2, 0.3, True),
        (0.31, 0.3, False),
        (10**30, 10**30 + 1, False),
        (True, 1, False),
        (1, True, False),
        (True, True, True),
        (None, None, True),
        (None, 0, False),
        ((1, [2]), [1, [2]], True),
        ([1, 2], [1], False),
        ({1: 2}, {"1": 2}, True),
        ({1: 2}, {"1": 3}, False),
        ("1", 1, False),
        ({1}, [1], False),
    ],
)
def test_values(found, expected, same):
    assert same_value(found, expected) == same


def test_a_value_in_a_list_of_one():
    assert same_value(3, [3], wrapped=True) and not same_value(3, [3])
    assert same_value([3], [3], wrapped=True) and not same_value(4, [3], wrapped=True)


STDIN = Case("stdin", "1 2", "3")


def outcome(verdict=None, **changes) -> Outcome:
    told = {"exit_code": 0, "signal": None, "stderr_bytes": b"", "limit": None, "wall_s": 0.1}
    return Outcome(**{"stdout_bytes": json.dumps(verdict).encode(), **told, **changes})


@pytest.mark.parametrize(
    ("what", "ending"),
    [
        (outcome({"results": [{"printed": "3"}]}), "passed"),
        (outcome({"results": [{"printed": "3"}]}, exit_code=1), "crash"),
        (outcome({"results": [{"printed": "3"}]}, limit="wall", exit_code=None), "time"),
        (outcome(stdout_bytes=b"", limit="output", exit_code=None), "output"),
        (outcome(stdout_bytes=b"", signal=9, exit_code=None), "crash"),
        (outcome(stdout_bytes=b"[1]"), "crash"),
        (outcome({"results": [{"stopped": "SIGSEGV", "printed": "3"}]}), "crash"),
    ],
)
def test_without_a_verdict_nothing_is_passed(what, ending):
    [result] = results_of(what, (STDIN,))
    assert result.ending == ending


def wrong(text: str, public: bool = True, **changes) -> Result:
    return Result(
        Case("stdin", text, f"wanted {text}", public), "wrong", **{"output": f"said {text}", **changes}
    )


def error(public: bool = True) -> Result:
    frames = ((3, "f", "return g()"), (7, "g", "raise ValueError(x)"))
    return Result(
        Case("stdin", "the input", "", public), "error", error="ValueError: the input", frames=frames
    )


def test_an_error_goes_before_limits_and_those_before_wrong_answers():
    slow = Result(Case("stdin", "slow input", "", True), "time")
    assert feedback_on([wrong("a"), slow, error()], False) == (
        "Runtime Error\nValueError: the input\n  line 3, in f: return g()\n  line 7, in g: raise ValueError(x)\n\n"
        "Last Executed Input:\nthe input"
    )
    assert feedback_on([wrong("a"), slow], False) == "Time Limit Exceeded\n\nLast Executed Input:\nslow input"


def test_the_two_shortest_wrong_answers_are_shown():
    told = feedback_on([wrong("aaa"), wrong("aa"), wrong("a"), Result(STDIN, "passed")], False)
    assert told == (
        "Wrong Answer\n\nInput:\na\nOutput:\nsaid a\nExpected:\nwanted a\n\n"
        "Input:\naa\nOutput:\nsaid aa\nExpected:\nwanted aa"
    )
    assert "(nothing)" in feedback_on([wrong("a", output="")], False)


def test_code_that_asserts_is_shown_with_the_last_value():
    case = Case("check", "assert f(1) == 2", public=True)
    failed = Result(case, "wrong", "3", "said\n" * 12, statement="assert f(1) == 2")
    assert feedback_on([failed], False) == (
        "Wrong Answer\n\nTest:\nassert f(1) == 2\nLast value:\n3\nPrinted:\n" + "said\n" * 9 + "said..."
    )
    failed = Result(case, "wrong", "", error="TypeError: no", statement="assert f(1) + 1")
    assert feedback_on([failed], False) == "Wrong Answer\n\nTest:\nassert f(1) + 1\nTypeError: no"


@pytest.mark.parametrize("ending", ["error", "crash", "time", "memory", "output", "wrong"])
def test_a_private_test_is_not_shown_but_by_an_option(ending):
    case = Case("stdin", "hidden input", "hidden answer")
    result = Result(case, ending, "hidden output", "hidden output", "ValueError: hidden", statement="hidden")
    told = feedback_on([result], False)
    assert told and "hidden" not in told
    assert "hidden" in feedback_on([result], True)
    # a public one that failed in the same way is shown in its place
    assert "shown" in feedback_on([result, Result(Case("stdin", "shown", "", True), ending)], False)


def test_fields_are_cut_and_so_is_the_whole():
    long = feedback_on([wrong("\n".join(map(str, range(20)))), wrong("x" * 999)], False)
    assert "6\n7..." in long and "\n8\n" not in long
    assert "x" * 250 + "..." in long and "x" * 251 not in long
    frames = tuple((n, "f", "y" * 500) for n in range(20))
    assert len(feedback_on([Result(STDIN, "error", error="e" * 500, frames=frames)], True)) == 2000


def test_a_syntax_error_says_so_and_where():
    told = feedback_on(
        [
            Result(
                None,
                "syntax",
                error="SyntaxError: '(' was never closed (line 2)",
                frames=((0, "", "print("),),
            )
        ],
        False,
    )
    assert told == (
        "Syntax Error: the program does not compile.\nSyntaxError: '(' was never closed (line 2)\n    print("
    )
    assert feedback_on([Result(STDIN, "passed")], False) == ""
