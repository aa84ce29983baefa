"""The graders that bring libraries with them, in the processes in which a run grades."""

import json

import pytest

from sdpo_megatron.config import GradingSettings, TaskSettings
from sdpo_megatron.envs import build_environment
from sdpo_megatron.envs.grading.pool import GradingPool
from sdpo_megatron.records import Grade, Ungraded
from tests.graders import answering


def graded(task: TaskSettings, *answers: str) -> list[Grade | Ungraded]:
    """Grades of responses to the first training problem; {} stands for its answer."""
    env = build_environment(task)
    problem = env.train_problems()[0]
    pool = GradingPool(task, env, GradingSettings(num_workers=2))
    futures = [pool.submit(problem, answering(answer.replace("{}", problem.answer))) for answer in answers]
    return [future.result(120) for future in futures]


def test_math_verify_keeps_its_time_limits_there(tmp_path):
    (tmp_path / "train").write_text(json.dumps({"question": "1?", "answer": "1"}))
    task = TaskSettings(env="math_answer", options={"train_file": str(tmp_path / "train")})
    right, wrong, endless = graded(task, r"\boxed{1.0}", r"\boxed{2}", r"\boxed{9^{9^{9}}}")
    assert isinstance(right, Grade) and right.reward == 1
    assert isinstance(wrong, Grade) and wrong.reward == 0
    assert isinstance(endless, Ungraded) and "TimeoutError: math-verify compared" in endless.cause


def test_reasoning_gym_scores_there_what_another_process_made():
    pytest.importorskip("reasoning_gym", reason="the extra gym is not installed")
    task = TaskSettings(
        env="reasoning_gym", options={"dataset": "knights_knaves", "train_size": 2, "test_size": 1}
    )
    right, wrong = graded(task, "<answer>{}</answer>", "<answer>1</answer>")
    assert isinstance(right, Grade) and right.reward == 1 and right.metrics == {"score": 1}
    assert isinstance(wrong, Grade) and wrong.reward == 0
