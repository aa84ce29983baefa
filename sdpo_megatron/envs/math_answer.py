r"""Mathematical questions whose answer stands in \boxed{}: MATH, GSM8K, AIME, and files of one's own.

A line has a question, `question` or `problem`, and what is right: `answer` or, as in MATH's training files, a
`solution` whose last box holds it. Of an answer with a line `#### 18`, as in GSM8K, what stands there counts. The id is
`id`, `unique_id`, `idx` or the line's number; other keys are passed over.

math-verify decides whether two answers are equal. Its time limits are alarms, which work in a process's main thread
alone: elsewhere each answer would be wrong without a word.
"""

import re
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from math_verify import parse, verify
from math_verify.errors import TimeoutException

from sdpo_megatron.envs.data.lines import Line, Row
from sdpo_megatron.envs.from_files import FileOptions, FromFiles
from sdpo_megatron.envs.judging.boxed import last_boxed
from sdpo_megatron.errors import UserError, quoted
from sdpo_megatron.records import Grade, Message, Problem, Rollout

_LIMIT_S = 5
"""For reading an answer, and for each comparison of two."""


class MathAnswerOptions(FileOptions):
    instruction: str = r"Please reason step by step, and put your final answer within \boxed{}."
    """Stands behind each question; empty for none."""
    require_box: bool = True
    r"""Whether an answer outside of \boxed{} is wrong. Else math-verify looks for one in a response without a box."""
    feedback_shows_answer: bool = False
    """Whether the feedback on a wrong response says with what it was compared, which is the right answer."""


class MathAnswer(FromFiles):
    Options = MathAnswerOptions
    judged_by = ("math-verify",)
    example = '{"question": ..., "answer": ...}'

    @classmethod
    def problem(cls, line: Line, options: MathAnswerOptions) -> Problem:
        question, answer, name = _parts(line)
        content = "\n\n".join(filter(None, [question, options.instruction]))
        return Problem(id=name, messages=[Message(role="user", content=content)], answer=answer)

    def warm_up(self) -> None:
        """Sympy loads parts of itself at its first comparison, which took nearly as long as an answer may once."""
        for right, answer in [(r"\frac{1}{2}", "0.5"), ("x^2-1", "(x-1)(x+1)"), ("(1,2)", r"\{1,2\}")]:
            _equal(right, f"$\\boxed{{{answer}}}$", limit_s=60)

    def grade(self, problem: Problem, rollout: Rollout) -> Grade:
        """Raises TimeoutError where math-verify needs too long."""
        box = last_boxed(rollout.text)
        if box:
            return self._judge(problem.answer, f"$\\boxed{{{box}}}$", box, correct_format=True)
        if not self.options.require_box and "\\boxed" not in rollout.text:
            return self._judge(
                problem.answer, rollout.text, "The answer of the response", correct_format=False
            )
        return Grade(reward=0.0, feedback=_without_box(rollout), correct_format=False, answer="")

    def _judge(self, right: str, text: str, shown: str, *, correct_format: bool) -> Grade:
        if _equal(right, text, limit_s=_LIMIT_S):
            return Grade(reward=1.0, correct_format=correct_format, answer=right)
        answer = "".join(shown.split())
        shown = shown if len(shown) <= 200 else shown[:200] + "…"
        feedback = f"{shown} is wrong."
        if self.options.feedback_shows_answer:
            feedback = f"{shown} is not equal to the right answer, {right}."
        return Grade(reward=0.0, feedback=feedback, correct_format=correct_format, answer=answer)


class _Row(Row):
    id: str | int | None = None
    unique_id: str | None = None
    idx: int | None = None
    problem: str = ""
    question: str = ""
    answer: str | int | float | None = None
    solution: str = ""


def _parts(line: Line) -> tuple[str, str, str]:
    """Question, right answer and id."""
    row = line.fields(_Row)
    question = row.problem or row.question
    if not question.strip():
        raise UserError(
            f"{line.where}: 'question' (or 'problem') is missing or empty; add it. {line.shown('question')}"
        )
    if row.answer is not None:
        answer = str(row.answer).strip()
        if final := re.findall(r"^####(.*)$", answer, re.MULTILINE):
            answer = final[-1].strip()
        if not answer:
            raise UserError(f"{line.where}: 'answer' is empty; write one.")
    elif row.solution:
        answer = last_boxed(row.solution) or ""
        if not answer:
            raise UserError(rf"{line.where}: 'solution' holds no answer in \boxed{{}}; add 'answer'.")
    else:
        raise UserError(f"{line.where}: 'answer' (or 'solution') is missing; add it. {line.shown('answer')}")
    return question, answer, line.name(row.id, row.unique_id, row.idx)


def _without_box(rollout: Rollout) -> str:
    if rollout.finish_reason == "length":
        return r"The response was cut off before its answer stood in \boxed{}; answer in fewer words."
    return r"The response does not put its answer into \boxed{}."


def _equal(right: str, text: str, *, limit_s: int) -> bool:
    """Whether what `text` answers is equal to the right answer, as math-verify sees it."""
    found = _parsed(text, limit_s)
    for one in _right(right, limit_s):
        for other in found:
            try:
                if verify(one, other, timeout_seconds=limit_s, raise_on_error=True):
                    return True
            # a BaseException, and no TimeoutError
            except TimeoutException:
                raise TimeoutError(
                    f"math-verify compared {quoted(text)} with {quoted(right)} for {limit_s} s"
                ) from None
            # sympy raises many kinds for what it cannot compare, which math-verify takes for unequal
            except Exception:
                continue
    return False


@lru_cache(maxsize=4096)
def _right(answer: str, limit_s: int) -> Sequence[Any]:
    return _parsed(f"$\\boxed{{{answer}}}$", limit_s)


def _parsed(text: str, limit_s: int) -> Sequence[Any]:
    """What math-verify reads in a text: as a rule the expression and its letters; nothing where it finds none."""
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("math-verify's time limits are alarms, and those are the main thread's alone")
    try:
        return parse(text, parsing_timeout=limit_s, raise_on_error=True)
    except TimeoutException:
        raise TimeoutError(f"math-verify read {quoted(text)} for {limit_s} s") from None
    # its parsers raise many kinds for what is no mathematics
    except Exception:
        return []
