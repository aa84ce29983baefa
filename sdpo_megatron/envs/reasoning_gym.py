"""Problems of reasoning-gym's generators: arithmetic, logic, games, graphs and more, each with a scorer of its own.

The package is an extra: pip install 'sdpo_megatron[gym]'.
"""

import importlib
import json
import os
import pickle
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from sdpo_megatron.config import NonNegative, Section
from sdpo_megatron.envs.base import Environment
from sdpo_megatron.errors import RunFailed, UserError
from sdpo_megatron.records import Grade, Message, Problem, Rollout

THRESHOLD = 0.99
"""Of the scorer's score: some give 0.01 or more to a wrong answer."""
SYSTEM = (
    "Think step by step. Then write the final answer, and nothing but it, between <answer> and </answer>. Where the "
    "question shows in which form to answer, keep to it."
)
_TAG = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL)


MOST_PROBLEMS = 1_000_000


class ReasoningGymOptions(Section):
    dataset: str
    """Name of a generator, such as chain_sum."""
    config: dict[str, Any] = {}
    """The generator's own settings, such as {min_terms: 2}."""
    train_size: Annotated[int, Field(gt=0, le=MOST_PROBLEMS)] = 2000
    """Training problems at most: questions that are held out or drawn before are left out. Most generators make
    thousands in a second, some three (knight_swap)."""
    test_size: Annotated[int, Field(gt=0, le=MOST_PROBLEMS)] = 100
    """Held-out problems at most."""
    seed: NonNegative = 0
    """Seed of the problems, apart from run.seed. Two seeds share problems only where there are few."""
    tags: bool = True
    """Whether a system turn asks for the answer between <answer> and </answer>, where it then has to stand. Else the
    whole response is the answer, and rollout.system_prompt may say how to answer."""


class ReasoningGym(Environment):
    judged_by = ("reasoning-gym",)
    Options: ClassVar = ReasoningGymOptions

    def __init__(self, options: ReasoningGymOptions) -> None:
        """Raises UserError where the package is missing, the generator unknown, or its configuration refused."""
        self.options = options
        problems: dict[str, Problem] = {}
        for index, entry in enumerate(_entries(options)):
            problems.setdefault(entry["question"], self._problem(index, entry))
        distinct = list(problems.values())
        self._test = [problem for problem in distinct if problem.metadata["index"] < options.test_size]
        self._train = distinct[len(self._test) :]

    def train_problems(self) -> Sequence[Problem]:
        return self._train

    def test_problems(self) -> Sequence[Problem]:
        return self._test

    def warm_up(self) -> None:
        self._scorer  # noqa: B018

    def grade(self, problem: Problem, rollout: Rollout) -> Grade:
        """The reward is 1 where the generator's score reaches 0.99, else 0; the score is a metric."""
        answer = rollout.text.strip()
        if self.options.tags:
            tagged = _TAG.findall(rollout.text)
            if not tagged:
                feedback = "The response puts no answer between <answer> and </answer>."
                return Grade(reward=0.0, feedback=feedback, correct_format=False)
            answer = tagged[-1].strip()
        score = self._score(answer, problem.metadata["entry"])
        if score >= THRESHOLD:
            return Grade(reward=1.0, metrics={"score": score})
        shown = answer if len(answer) <= 200 else answer[:200] + "…"
        return Grade(reward=0.0, feedback=f"The answer {shown} is wrong.", metrics={"score": score})

    def _score(self, answer: str, entry: dict[str, Any]) -> float:
        """The generator's own score, unless it is for nonsense: some take whatever is not True for False, or nan for
        any number."""
        try:
            score = self._scorer.score_answer(answer, entry)
            if score < THRESHOLD or answer == entry["answer"]:
                return float(score)
            if re.search(r"\bnan\b", answer, re.IGNORECASE):
                return 0.0
            return 0.0 if self._scorer.score_answer("zzz", entry) >= THRESHOLD else float(score)
        # the scorers raise many kinds for an answer that has another form than theirs
        except Exception:
            return 0.0

    @cached_property
    def _scorer(self) -> Any:
        gym = importlib.import_module("reasoning_gym")
        return gym.create_dataset(self.options.dataset, **self.options.config, seed=0, size=1)

    def _problem(self, index: int, entry: dict[str, Any]) -> Problem:
        messages = [Message(role="user", content=entry["question"])]
        if self.options.tags:
            messages.insert(0, Message(role="system", content=SYSTEM))
        return Problem(
            id=f"{self.options.dataset} {self.options.seed} {index}",
            messages=messages,
            answer=entry["answer"] or "",
            metadata={"index": index, "entry": entry},
        )


def _entries(options: ReasoningGymOptions) -> list[dict[str, Any]]:
    """The held-out entries, then the training ones, of one data set."""
    script = Path(__file__).parent / "data" / "reasoning_gym_entries.py"
    request = {
        "dataset": options.dataset,
        "config": options.config,
        # the k-th problem of a data set is drawn with its seed plus k
        "seed": random.Random(f"reasoning_gym {options.seed}").getrandbits(31),
        "size": options.test_size + options.train_size,
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "entries"
        done = subprocess.run(
            [sys.executable, script, file],
            input=json.dumps(request),
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise RunFailed(f"reasoning-gym could not make problems of {options.dataset}: {last}")
        made = pickle.loads(file.read_bytes())
    if isinstance(made, str):
        raise UserError(made)
    return made
