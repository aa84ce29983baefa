"""The README's environment, exactly as it stands there: in a file of its own, named by its import path."""

import re
import sys
from pathlib import Path

import pytest

from sdpo_megatron.algorithm.reprompt import Template
from sdpo_megatron.config import GradingSettings, TaskSettings
from sdpo_megatron.envs import build_environment
from sdpo_megatron.envs.grading.pool import GradingPool
from sdpo_megatron.records import Grade, Hints
from tests.graders import answering

README = Path(__file__).parents[3] / "README.md"


@pytest.fixture
def text() -> str:
    (code,) = re.findall(
        r"```python\n(.*?)```", README.read_text().partition("## An environment of your own")[2], re.S
    )
    return code


def test_it_is_short(text: str):
    assert len(text.splitlines()) <= 30


def test_it_runs(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "backwards.py").write_text(text)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    task = TaskSettings(env="backwards:Backwards", options={"words": ["lemon", "grape"]})
    env = build_environment(task)
    (problem, _), pool = env.train_problems(), GradingPool(task, env, GradingSettings())
    texts = ["nomel", " nomel\n", "nomal", "n", "", "nomels"]
    grades = [pool.submit(problem, answering(text)).result(60) for text in texts]
    assert all(isinstance(grade, Grade) for grade in grades)
    told = [(grade.reward, grade.feedback) for grade in grades if isinstance(grade, Grade)]
    wrong = [(0.0, f"Letter {k} is wrong.") for k in (4, 2, 1)]
    assert told == [(1.0, ""), (1.0, ""), *wrong, (0.0, "")]
    shown = env.show(problem, Hints(solution="nomel"), Template())
    assert "nomel" in shown[-1]["content"] and problem.messages[0]["content"] in shown[-1]["content"]
