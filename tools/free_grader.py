"""The environment of tools/bench_host.py, whose grades cost nothing."""

import random
from collections.abc import Sequence
from typing import ClassVar

from sdpo_megatron.envs.base import Environment
from sdpo_megatron.records import Grade, Problem, Rollout
from sdpo_megatron.strict_yaml.section import Section

SUCCESSES = 0.4
"""Share of responses that succeed."""


class FreeGrader(Environment):
    Options: ClassVar = Section

    def train_problems(self) -> Sequence[Problem]:
        return []

    def grade(self, problem: Problem, rollout: Rollout) -> Grade:
        right = random.random() < SUCCESSES
        return Grade(reward=float(right), feedback="" if right else "The last number is wrong.")
