"""Programs in Python, judged by tests in a sandbox: LiveCodeBench, DeepCoder, HumanEval, MBPP, and one's own files."""

import math
import os
import random
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from sdpo_megatron.envs.base import Part
from sdpo_megatron.envs.data.lines import Line
from sdpo_megatron.envs.from_files import FileOptions, FromFiles
from sdpo_megatron.envs.programs.cases import Case, Suite
from sdpo_megatron.envs.programs.feedback import CUT_OFF, NO_PROGRAM, feedback_on
from sdpo_megatron.envs.programs.formats import FORMATS
from sdpo_megatron.envs.programs.judge import judge, program_in, wall_s
from sdpo_megatron.envs.sandbox.choice import choose
from sdpo_megatron.envs.sandbox.settings import SandboxSettings
from sdpo_megatron.errors import UserError
from sdpo_megatron.records import Grade, Problem, Rollout
from sdpo_megatron.strict_yaml.section import NonNegative, Positive
from sdpo_megatron.terminal import tell

if TYPE_CHECKING:
    from sdpo_megatron.run_dir.records_file import RecordedResponse

GRADER_S = 120.0
"""Seconds beyond the tests' own that a grader may take: for a sandbox that is slow to start, or a service's queue."""


class PythonTestsOptions(FileOptions):
    test_file: str | None = None
    """Held-out questions. Without it `split` says which are."""
    format: Literal["livecodebench", "deepcoder", "humaneval", "mbpp", "own"]
    split: Literal["held_out", "paper"] = "held_out"
    """Of a single file. `held_out` keeps a share of the questions for evaluation, with all of their tests. `paper`
    trains and evaluates on the same questions, as arXiv 2601.20802 does: on a random half of the private tests, which
    feedback may show then, and on all tests."""
    test_questions: NonNegative | None = None
    """How many questions `held_out` keeps: by default a tenth, at least one."""
    seed: NonNegative = 0
    """Of both splits."""
    max_tests: Positive = 50
    """Tests of a question that are run at most: the public ones, then the first of the others."""
    show_private_tests: bool = False
    """Whether feedback may show tests that are not in the question."""
    sandbox: SandboxSettings = SandboxSettings()
    """What runs the programs."""


class PythonTests(FromFiles):
    """The reward is 1 for a program that passes all tests, else 0; `tests_passed` is the share that it passes."""

    Options: ClassVar[Any] = PythonTestsOptions
    example = "a row as task.options.format has it"
    most_at_once: ClassVar[int | None] = len(os.sched_getaffinity(0))

    def __init__(self, options: PythonTestsOptions) -> None:
        """Raises UserError for a file that cannot be read, and where no sandbox works here."""
        if options.test_file and (options.split == "paper" or options.test_questions is not None):
            raise UserError(
                "task.options.test_file has the held-out questions: remove split and test_questions."
            )
        super().__init__(options)
        if options.split == "paper":
            self._test = self._train
            self._train = [_half_public(question, options.seed) for question in self._test]
        elif not options.test_file:
            self._train, self._test = _held_out(self._train, options.test_questions, options.seed)
        # apart from the problems, so that no grader is handed them
        self._tests: dict[str, dict[str, Suite]] = {
            "train": {question.id: question.metadata["tests"] for question in self._train},
            "test": {question.id: question.metadata["tests"] for question in self._test},
        }
        self._train, self._test = (
            [replace(question, metadata=question.metadata | {"tests": name}) for question in questions]
            for name, questions in (("train", self._train), ("test", self._test))
        )
        most = max(len(tests.cases) for tests in (self._tests["train"] | self._tests["test"]).values())
        self.grade_limit_s = wall_s(most) + GRADER_S
        self._sandbox, self._sandbox_line = choose(options.sandbox)

    @classmethod
    def problem(cls, line: Line, options: PythonTestsOptions) -> Problem:
        question = FORMATS[options.format](line)
        if not question.metadata["tests"].cases:
            raise UserError(f"{line.where}: the question has no test; add one, or leave it out.")
        return question

    def _labelled(self, line: Line) -> Problem:
        # line by line: all tests of a set may be gigabytes
        question = super()._labelled(line)
        cases = sorted(question.metadata["tests"].cases, key=lambda case: not case.public)
        return _with_cases(question, cases[: self.options.max_tests])

    def answer_key(self, problem: Problem) -> str:
        return repr(self._tests[problem.metadata["tests"]][problem.id])

    def warm_up(self) -> None:
        """Says which sandbox was taken."""
        tell(self._sandbox_line)

    def grade(self, problem: Problem, rollout: Rollout) -> Grade:
        program = program_in(rollout.text)
        if program is None:
            words = CUT_OFF if rollout.finish_reason == "length" else NO_PROGRAM
            return Grade(reward=0.0, feedback=words, correct_format=False, metrics={"tests_passed": 0.0})
        tests = self._tests[problem.metadata["tests"]][problem.id]
        results = judge(self._sandbox, self.options.sandbox, program, tests)
        passed = sum(result.ending == "passed" for result in results)
        right = passed == len(tests.cases)
        return Grade(
            reward=float(right),
            feedback="" if right else feedback_on(results, self.options.show_private_tests),
            metrics={"tests_passed": passed / len(tests.cases)},
        )

    @classmethod
    def render(cls, response: "RecordedResponse") -> list[Part]:
        """The program that was run, what its tests said, and all that was answered."""
        program = program_in(response.response)
        parts = [] if program is None else [Part(kind="code", title="Program", text=program)]
        if response.feedback:
            parts.append(Part(kind="code", title="Failed tests", text=response.feedback))
        return [*parts, *super().render(response)]


def _with_cases(question: Problem, cases: Iterable[Case]) -> Problem:
    tests = replace(question.metadata["tests"], cases=tuple(cases))
    return replace(question, metadata=question.metadata | {"tests": tests})


def _held_out(
    questions: list[Problem], test_questions: int | None, seed: int
) -> tuple[list[Problem], list[Problem]]:
    """Returns the questions for training and those for evaluation, each in the file's order."""
    count = math.ceil(len(questions) / 10) if test_questions is None else test_questions
    if count >= len(questions):
        raise UserError(
            f"task.options.test_questions keeps {count} of {len(questions)} questions, and none is left to train on."
        )
    kept = set(random.Random(f"held out {seed}").sample(range(len(questions)), count))
    train = [question for number, question in enumerate(questions) if number not in kept]
    return train, [question for number, question in enumerate(questions) if number in kept]


def _half_public(question: Problem, seed: int) -> Problem:
    """Returns the question with a random half of its private tests, at least one, which are public then; with its
    public ones where it has no private ones."""
    private = [case for case in question.metadata["tests"].cases if not case.public]
    if not private:
        return question
    half = random.Random(f"half {seed} {question.id}").sample(private, math.ceil(len(private) / 2))
    return _with_cases(question, (replace(case, public=True) for case in private if case in half))
