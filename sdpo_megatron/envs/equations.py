"""Integer equations behind two worked examples: `What is 23 + 41?` -> `23 + 41 = 64`.

A task that a 135M model can get better at on a CPU: SmolLM2 answers about one 2-digit sum in five. The
examples matter: asked without them it hardly ever writes what a strict grader accepts.

With `form: brackets` the right answer is `[23 + 41 = 64]` and the student's examples do not say so: no response
succeeds, and only the environment's feedback can teach.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal, overload

from pydantic import Field

from sdpo_megatron.algorithm.reprompt import Template
from sdpo_megatron.config import NonNegative, Section
from sdpo_megatron.envs.base import Environment
from sdpo_megatron.envs.graders import OF_BRACKETS, equation
from sdpo_megatron.errors import ConfigError
from sdpo_megatron.records import Grade, Hints, Message, Problem, Rollout

MOST_PROBLEMS = 1_000_000
"""They take seconds to draw, in each rank."""
Operator = Literal["+", "-", "*"]


class EquationsOptions(Section):
    digits: Annotated[int, Field(ge=1, le=8)] = 2
    """Digits of both operands; the first is never 0."""
    operators: Annotated[list[Operator], Field(min_length=1)] = ["+"]
    """Each problem has one of these. Of a difference, the larger operand comes first."""
    train_size: Annotated[int, Field(gt=0, le=MOST_PROBLEMS)] = 8192
    """Training problems at most; there are fewer where the numbers run out (2-digit sums: 7,588)."""
    test_size: Annotated[int, Field(gt=0, le=MOST_PROBLEMS)] = 256
    """Held-out problems. Neither they nor the same with swapped operands are trained on."""
    seed: NonNegative = 0
    """Seed of the problems; it is apart from run.seed, so that runs with several seeds are measured on the same
    problems."""
    form: Literal["plain", "brackets"] = "plain"
    """Whether the right answer is the equation, or the equation in square brackets, which the teacher's examples have
    and the student's have not."""
    feedback: Literal["none", "form", "mistake"] = "none"
    """What a wrong response is told in one line: nothing, how to write an equation where it wrote none, or whatever is
    wrong with it (never the answer)."""


class Equations(Environment):
    Options: ClassVar = EquationsOptions

    def __init__(self, options: EquationsOptions) -> None:
        """Raises ConfigError if so many held-out problems leave nothing to train on."""
        self.options = options
        self._test, self._train = _split(options)

    def train_problems(self) -> Sequence[Problem]:
        return self._train

    def test_problems(self) -> Sequence[Problem]:
        return self._test

    def grade(self, problem: Problem, rollout: Rollout) -> Grade:
        grade = equation(problem, rollout.text)
        told = {"none": False, "form": not grade.correct_format, "mistake": True}[self.options.feedback]
        return grade if told else replace(grade, feedback="")

    def show(self, problem: Problem, hints: Hints, template: Template) -> list[Message]:
        """Returns a conversation in which every user turn, the examples' too, is followed by its solution, twice, as in

            What is 23 + 41? Correct solution: 23 + 41 = 64
            23 + 41 = 64

        Measured on SmolLM2-135M: with the solution in the last turn only, the teacher is worse than its
        student, since the examples teach it to ignore what they do not have; said once it copies less often.
        The two statements stand on lines of their own, because in one line the student learns to end its
        answers with a full stop.

        What is to be in brackets is so in the examples too, and feedback that asks for them then follows every
        question on a line of its own: with it in the last turn only, the teacher writes one a fourth as often.
        """
        solution, feedback = hints.solution, hints.feedback
        bracketed = self.options.form == "brackets"
        messages = list(problem.messages)
        for k in range(0, len(messages) - 1, 2):
            answer = messages[k + 1]["content"]
            if bracketed:
                answer = f"[{answer}]"
                messages[k + 1] = Message(role="assistant", content=answer)
            if solution is not None:
                messages[k] = _with_solution(messages[k], answer)
            elif bracketed and feedback in OF_BRACKETS:
                messages[k] = _with_remark(messages[k], feedback)
        if feedback is not None:
            remark = (
                feedback if feedback in OF_BRACKETS else f"Feedback on an earlier wrong answer: {feedback}"
            )
            messages[-1] = _with_remark(messages[-1], remark, "\n" if feedback in OF_BRACKETS else " ")
        if solution is not None:
            messages[-1] = _with_solution(messages[-1], solution)
        return messages


def _with_remark(question: Message, remark: str, between: str = "\n") -> Message:
    return Message(role="user", content=f"{question['content']}{between}{remark}")


def _with_solution(question: Message, solution: str) -> Message:
    solution = solution.strip()
    return Message(role="user", content=f"{question['content']} Correct solution: {solution}\n{solution}")


def _split(options: EquationsOptions) -> tuple[Sequence[Problem], Sequence[Problem]]:
    """Held-out and training problems: unordered pairs of operands are drawn, so that no pair is in both."""
    low, high = 10 ** (options.digits - 1), 10**options.digits - 1
    size = high - low + 1
    pairs = size * (size + 1) // 2
    operators: list[Operator] = list(dict.fromkeys(options.operators))
    examples = {tuple(sorted(pair)) for pair in _example_pairs(options.digits)}
    available = (pairs - len(examples)) * len(operators)
    if options.test_size >= available:
        raise ConfigError(
            f"task.options.test_size is {options.test_size}, but there are only {available} equations with "
            f"{options.digits} digits besides the examples; set it to at most {available - 1}."
        )
    rng = random.Random(f"equations {options.seed}")
    wanted = options.test_size + options.train_size + len(examples) * len(operators)
    everything = range(pairs * len(operators))
    # The pair is the key's remainder: one pair under another operator may be in the other set.
    drawn: list[tuple[int, int, Operator]] = []
    for key in rng.sample(everything, min(wanted, len(everything))):
        k, pair = divmod(key, pairs)
        a, b = _unordered_pair(pair, low)
        if (a, b) not in examples:
            drawn.append((a, b, operators[k]))
    test = [rng.choice(_orders(*item)) for item in drawn[: options.test_size]]
    train = [order for item in drawn[options.test_size :] for order in _orders(*item)]
    rng.shuffle(train)
    del train[options.train_size :]
    return _Problems(test, options), _Problems(train, options)


class _Problems(Sequence[Problem]):
    """Problems that are made when they are asked for: a million of them would take gigabytes."""

    def __init__(self, drawn: list[tuple[int, int, Operator]], options: EquationsOptions) -> None:
        self._drawn, self._options = drawn, options

    def __len__(self) -> int:
        return len(self._drawn)

    @overload
    def __getitem__(self, index: int) -> Problem: ...

    @overload
    def __getitem__(self, index: slice) -> list[Problem]: ...

    def __getitem__(self, index: int | slice) -> Problem | list[Problem]:
        if isinstance(index, slice):
            return [_problem(*item, self._options) for item in self._drawn[index]]
        return _problem(*self._drawn[index], self._options)


def _unordered_pair(index: int, low: int) -> tuple[int, int]:
    """The index-th of (low, low), (low, low + 1), (low + 1, low + 1), (low, low + 2), ...; a <= b."""
    b = (math.isqrt(8 * index + 1) - 1) // 2
    return low + index - b * (b + 1) // 2, low + b


def _orders(a: int, b: int, operator: Operator) -> list[tuple[int, int, Operator]]:
    if operator == "-" or a == b:
        return [(b, a, operator)]
    return [(a, b, operator), (b, a, operator)]


def _example_pairs(digits: int) -> list[tuple[int, int]]:
    """Returns the operands of the examples: with two digits, 23 and 41, 58 and 17."""
    return [
        (int("23142314"[:digits]), int("41254125"[:digits])),
        (int("58365836"[:digits]), int("17291729"[:digits])),
    ]


def _problem(a: int, b: int, operator: Operator, options: EquationsOptions) -> Problem:
    messages: list[Message] = []
    for left, right in _example_pairs(options.digits):
        if operator == "-":
            left, right = max(left, right), min(left, right)
        messages.append(Message(role="user", content=_question(left, right, operator)))
        messages.append(Message(role="assistant", content=_answer(left, right, operator)))
    messages.append(Message(role="user", content=_question(a, b, operator)))
    return Problem(
        id=f"{a}{operator}{b}",
        messages=messages,
        answer=_answer(a, b, operator) if options.form == "plain" else f"[{_answer(a, b, operator)}]",
        grader="equation",
        canonical=True,
        metadata={"a": a, "b": b, "operator": operator},
    )


def _question(a: int, b: int, operator: Operator) -> str:
    return f"What is {a} {operator} {b}?"


def _answer(a: int, b: int, operator: Operator) -> str:
    result = {"+": a + b, "-": a - b, "*": a * b}[operator]
    return f"{a} {operator} {b} = {result}"
