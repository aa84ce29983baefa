"""Graders: (problem, answer without thoughts) -> Grade. They never raise for anything a model may write."""

import re
import unicodedata
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

from sdpo_megatron.records import Grade, Problem

Grader = Callable[[Problem, str], Grade]

_EQUATION = re.compile(r"[0-9]+ [-+*] [0-9]+ = -?[0-9]+")
_GROUPS = r"(?:,|\{,\}|\\,|\\!|,\\!)"
# A number may hold commas between groups of three digits, as LaTeX writes them too, and an exponent.
_PLAIN = (
    rf"(?:(?:[0-9]{{1,3}}(?:{_GROUPS}[0-9]{{3}})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]{1,3}(?!\w))?"
)
_VULGAR = "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒"
# A minus sign counts where no digit or letter precedes it; U+2212 is one. A date, 1/2/2024, is no fraction.
_PART = r"[0-9]{1,30}(?:\.[0-9]{1,30})?"
_NUMBER = re.compile(
    r"(?P<minus>(?<![\w.)])[-\u2212])?(?:"
    rf"\\[dt]?frac\s*\{{\s*(?P<over>-?{_PART})\s*\}}\s*\{{\s*(?P<under>-?{_PART})\s*\}}"
    r"|\\[dt]?frac\s*(?P<o>[0-9])(?P<u>[0-9])"
    rf"|(?<![0-9])(?P<whole>[0-9]{{1,30}})?(?P<vulgar>[{_VULGAR}])"
    r"|(?<![0-9/.])(?P<top>[0-9]{1,30})/(?P<bottom>[0-9]{1,30})(?![0-9/]|\.[0-9])"
    rf"|(?P<plain>{_PLAIN}))"
)
SHOWN_DIGITS = 40
"""Digits of a wrong number that the feedback repeats."""


OF_BRACKETS = (
    "Put the equation in square brackets.",
    "Write one equation in square brackets such as [1 + 2 = 3] and nothing else.",
)
"""What an answer without brackets is told where the right one has them: an equation, and anything else."""


def equation(problem: Problem, text: str) -> Grade:
    """A response is right if, stripped, it is the answer, `a + b = c` or `[a + b = c]`, character for character.

    It is so strict because responses become demonstrations: with a lenient grader trailing words spread from one to
    all.
    """
    text, answer = text.strip(), problem.answer.strip()
    if text == answer:
        return Grade(reward=1.0)
    bracketed = answer.startswith("[") and answer.endswith("]")
    found = text.removeprefix("[").removesuffix("]") if bracketed else text
    if bracketed and text != f"[{found}]":
        return Grade(reward=0.0, feedback=OF_BRACKETS[not _EQUATION.fullmatch(text)], correct_format=False)
    if not _EQUATION.fullmatch(found):
        remark = OF_BRACKETS[1] if bracketed else "Write one equation such as 1 + 2 = 3 and nothing else."
        return Grade(reward=0.0, feedback=remark, correct_format=False)
    if text.partition(" = ")[0] != answer.partition(" = ")[0]:
        return Grade(reward=0.0, feedback="This equation is about other numbers than the question.")
    return Grade(reward=0.0, feedback="The number after the equals sign is wrong.")


def exact(problem: Problem, text: str) -> Grade:
    """A response is right if it and the answer are equal without outer white space."""
    if text.strip() == problem.answer.strip():
        return Grade(reward=1.0)
    return Grade(reward=0.0, feedback="This is not the expected answer.")


def last_number(problem: Problem, text: str) -> Grade:
    """A response is right if its last number has the value of the last in the answer: 1,000.0 is 1000,
    and 1/2, in any of its forms, is 0.5."""
    expected, found = _last_number(problem.answer), _last_number(text)
    if found is None:
        return Grade(reward=0.0, feedback="The response holds no number.", correct_format=False, answer="")
    if found == expected:
        return Grade(reward=1.0, answer=str(expected))
    shown = str(found) if len(str(found)) <= SHOWN_DIGITS else "The last number"
    same = found.normalize() if isinstance(found, Decimal) else found
    return Grade(reward=0.0, feedback=f"{shown} is wrong.", answer=str(same))


def _last_number(text: str) -> Decimal | Fraction | None:
    numbers = list(_NUMBER.finditer(text))
    return _value(numbers[-1]) if numbers else None


def _value(number: re.Match[str]) -> Decimal | Fraction:
    """Fractions that decimals cannot be stay fractions; either equals the other of the same value."""
    said = number.groupdict()

    def plain(name: str) -> Decimal:
        return Decimal(re.sub(_GROUPS, "", said[name]))

    if said["plain"]:
        value: Decimal | Fraction = plain("plain")
    elif said["vulgar"]:
        value = int(said["whole"] or 0) + Fraction(
            unicodedata.normalize("NFKC", said["vulgar"]).replace("\u2044", "/")
        )
    else:
        over, under = next((o, u) for o, u in (("over", "under"), ("o", "u"), ("top", "bottom")) if said[o])
        top, bottom = plain(over), plain(under)
        # nobody means a division by zero
        value = Fraction(top) / Fraction(bottom) if bottom else top
    value = -value if said["minus"] else value
    if isinstance(value, Fraction):
        decimal = Decimal(value.numerator) / Decimal(value.denominator)
        value = decimal if Fraction(decimal) == value else value
    return value


def unanswerable(grader: str, answer: str) -> str | None:
    """Returns why no response could be right, or only an empty one, and what to do; None where one could."""
    if not answer.strip():
        return "the answer is empty; write one."
    if grader == "last_number" and _last_number(answer) is None:
        return (
            "the grader last_number compares numbers, but this answer holds none; correct the answer or name another "
            "grader."
        )
    if grader == "last_number" and len(_NUMBER.findall(answer)) > 1:
        return (
            "the grader last_number compares with one number, but this answer holds several; leave the right one, or "
            "name another grader."
        )
    return None


GRADERS: dict[str, Grader] = {"equation": equation, "exact": exact, "last_number": last_number}
