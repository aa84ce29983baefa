import json

import pytest

from sdpo_megatron.envs.math_answer import MathAnswer, MathAnswerOptions
from tests.graders import answering

FILES = {"math/math500.jsonl": 500, "math/aime24.jsonl": 30, "gsm8k/test.jsonl": 1319}


def build(data, file) -> MathAnswer:
    env = MathAnswer(MathAnswerOptions(train_file=str(data / file)))
    env.warm_up()
    return env


@pytest.mark.parametrize("file", FILES)
def test_right_answers_score_1_and_those_of_other_problems_0(data, file):
    env = build(data, file)
    problems = env.train_problems()
    assert len(problems) == FILES[file]
    wrong = [*problems[7:], *problems[:7]]
    for problem, other in zip(problems, wrong, strict=True):
        right = env.grade(problem, answering(rf"So it is $\boxed{{{problem.answer}}}$."))
        assert (right.reward, right.correct_format) == (1, True), problem
        if problem.answer != other.answer:
            assert env.grade(problem, answering(rf"\boxed{{{other.answer}}}")).reward == 0, (problem, other)


def test_the_reference_solutions_of_math_500_score_1(data):
    env = build(data, "math/math500.jsonl")
    lines = (data / "math/math500.jsonl").read_text(encoding="utf-8").splitlines()
    for problem, line in zip(env.train_problems(), lines, strict=True):
        assert env.grade(problem, answering(json.loads(line)["solution"])).reward == 1, problem


def test_aime_answers_are_numbers_with_or_without_leading_zeros(data):
    env = build(data, "math/aime24.jsonl")
    padded = [problem for problem in env.train_problems() if problem.answer.startswith("0")]
    assert len(padded) >= 3
    for problem in padded:
        assert env.grade(problem, answering(rf"\boxed{{{int(problem.answer)}}}")).reward == 1
        assert env.grade(problem, answering(rf"\boxed{{{int(problem.answer) + 1}}}")).reward == 0
