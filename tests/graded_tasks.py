"""Environments that fail in every way, for tests: named by their import paths, built again in the graders' host."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from sdpo_megatron.config import Section
from sdpo_megatron.envs.base import Environment
from sdpo_megatron.envs.equations import Equations, EquationsOptions
from sdpo_megatron.errors import GradingFault
from sdpo_megatron.records import Grade, Problem, Rollout


class FailingOptions(Section):
    directory: str
    """Where each grading leaves a file that names it."""
    broken: bool = False


class Failing(Environment):
    """Does what the response says."""

    Options: ClassVar = FailingOptions
    grade_limit_s: ClassVar = 20.0

    def __init__(self, options: FailingOptions):
        self.directory, self.warm = Path(options.directory), ""
        self.built_in = os.getpid()
        if options.broken:
            raise RuntimeError("of building it")

    def train_problems(self) -> Sequence[Problem]:
        return []

    def warm_up(self) -> None:
        self.warm = f"warm in {os.getpid()}"

    def grade(self, problem: Problem, rollout: Rollout) -> Grade:
        what, _, argument = rollout.text.partition(" ")
        attempts = len(list(self.directory.glob(f"{problem.id} *")))
        (self.directory / f"{problem.id} {attempts}").write_text(str(os.getpid()))
        return getattr(self, what)(argument, attempts)

    def reward(self, value: str, attempts: int) -> Grade:
        return Grade(reward=float(value), feedback=self.warm, metrics={"pid": os.getpid()})

    def wait(self, seconds: str, attempts: int) -> Grade:
        time.sleep(float(seconds))
        return Grade(reward=1.0)

    def hang(self, _: str, attempts: int) -> Grade:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        if os.fork() == 0:
            (self.directory / "child").write_text(str(os.getpid()))
        while True:
            time.sleep(1)

    def alarm(self, _: str, attempts: int) -> Grade:
        """signal.alarm works in the main thread alone."""
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.alarm(1)
        signal.pause()
        return Grade(reward=1.0)

    def fault(self, times: str, attempts: int) -> Grade:
        if attempts < int(times):
            raise GradingFault(f"no service, attempt {attempts}")
        return Grade(reward=1.0)

    def end(self, times: str, attempts: int) -> Grade:
        if attempts < int(times):
            os._exit(0)
        return Grade(reward=1.0)

    def none(self, _: str, attempts: int) -> Grade:
        return None  # type: ignore[return-value]

    def unpicklable(self, _: str, attempts: int) -> Grade:
        return Grade(reward=1.0, feedback=lambda: 1)  # type: ignore[arg-type]

    def typed(self, what: str, attempts: int) -> Grade:
        wrong = {"feedback": 5, "correct_format": None, "answer": 5, "metrics": [1], "reward": "1"}
        return Grade(**({"reward": 0.0} | {what: wrong[what]}))  # type: ignore[arg-type]

    def surrogate(self, how: str, attempts: int) -> Grade:
        if how == "raised":
            raise ValueError("half \ud800")
        return Grade(reward=0.0, feedback="half \ud800", answer="\udfff", metrics={"\ud800": 1.0})

    def leave(self, _: str, attempts: int) -> Grade:
        child = subprocess.Popen(["sleep", "1000"])
        (self.directory / "child").write_text(str(child.pid))
        return Grade(reward=1.0)

    def exit(self, _: str, attempts: int) -> Grade:
        raise SystemExit("from the grader")


class Strict(Failing):
    """Taking too long is the response's fault."""

    slow_grade: ClassVar = Grade(reward=0.0, feedback="Too slow.")
    most_at_once: ClassVar = 2


class Unfinished(Environment):
    Options: ClassVar = FailingOptions

    def train_problems(self) -> Sequence[Problem]:
        return []


class WithoutOptions(Unfinished):
    Options: ClassVar = dict  # type: ignore[assignment]

    def grade(self, problem: Problem, rollout: Rollout) -> Grade:
        raise NotImplementedError


class UnluckyOptions(EquationsOptions):
    lost: float = 0.0
    """Share of the responses whose grader finds no service."""
    seconds: float = 0.0
    """How long a grade takes."""


class Unlucky(Equations):
    """Sums, asked for in bad circumstances."""

    Options: ClassVar = UnluckyOptions

    def __init__(self, options: UnluckyOptions):
        super().__init__(options)
        self.circumstances = options

    def grade(self, problem: Problem, rollout: Rollout) -> Grade:
        time.sleep(self.circumstances.seconds)
        if random.random() < self.circumstances.lost:
            raise GradingFault("the service is not there")
        return super().grade(problem, rollout)
