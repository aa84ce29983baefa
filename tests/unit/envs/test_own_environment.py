"""The README's environment, exactly as it stands there: in a file of its own, named by its import path."""

import re
import sys
from pathlib import Path

import pytest

from sdpo_megatron.algorithm.reprompt import Template
from sdpo_megatron.config import GradingSettings, TaskSettings
from sdpo_megatron.envs import build_environment
from sdpo_megatron.envs.grading.pool import GradingPool
from sdpo_megatron.errors import ConfigError
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


@pytest.mark.parametrize(
    "problems,said",
    [
        ("None", "returned NoneType; return a list of Problem"),
        ("(p for p in ())", "returned generator; return a list of Problem"),
        ("[{'id': 'a'}]", "holds dict at place 0"),
        ("[Problem(id='a', messages='text')]", "holds problem 'a' whose messages are no list"),
        ("[Problem(id='a', messages=[{'role': 'user'}])]", "holds problem 'a' whose messages are no list"),
        ("[Problem(id=1, messages=[], answer='3')]", "whose id or answer is no text: 1"),
        (
            "[Problem(id='a', messages=[M]), Problem(id='a', messages=[M])]",
            "holds two problems whose id is 'a'",
        ),
        ("self.nothing", "AttributeError: 'Own' object has no attribute 'nothing'"),
    ],
)
def test_mistakes_in_its_problems_end_before_anything_starts(
    problems: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    code = f"""
from sdpo_megatron.config import Section
from sdpo_megatron.envs import Environment
from sdpo_megatron.records import Problem
M = {{"role": "user", "content": "?"}}
class Own(Environment):
    Options = Section
    def train_problems(self):
        return {problems}
    def grade(self, problem, rollout):
        pass
"""
    (tmp_path / "own_of_a_test.py").write_text(code)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    sys.modules.pop("own_of_a_test", None)
    with pytest.raises(ConfigError, match=re.escape(said)):
        build_environment(TaskSettings(env="own_of_a_test:Own"))
    with pytest.raises(ConfigError, match="write the import path of a class as package.module:Class"):
        build_environment(TaskSettings(env="own_of_a_test.Own"))


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
