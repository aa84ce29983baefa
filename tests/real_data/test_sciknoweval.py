import json

import pytest

from sdpo_megatron.envs.multiple_choice import MultipleChoice, MultipleChoiceOptions, official_system
from tests.graders import answering

SIZES = {"biology": (450, 50), "chemistry": (1890, 210), "material": (841, 94), "physics": (720, 80)}
"""Rows of the paper's splits."""


def build(data, subject, **options) -> MultipleChoice:
    train, test = (str(data / f"sciknoweval/{subject}_{split}.jsonl") for split in ("train", "test"))
    return MultipleChoice(MultipleChoiceOptions(train_file=train, test_file=test, **options))


@pytest.mark.parametrize("subject", SIZES)
def test_each_question_is_asked_as_its_file_has_it(data, subject):
    env = build(data, subject)
    problems = {"train": env.train_problems(), "test": env.test_problems()}
    assert tuple(map(len, problems.values())) == SIZES[subject]
    for split, asked in problems.items():
        rows = [
            json.loads(line)
            for line in (data / f"sciknoweval/{subject}_{split}.jsonl").open(encoding="utf-8")
        ]
        assert [[m["content"] for m in p.messages] for p in asked] == [
            [r["system"], r["prompt"]] for r in rows
        ]
        assert [p.answer for p in asked] == [r["answer"] for r in rows]
        assert {r["system"] for r in rows} == {official_system(4)}


@pytest.mark.parametrize("grader", ["default", "official"])
@pytest.mark.parametrize("subject", SIZES)
def test_right_letters_score_1_and_all_others_0(data, subject, grader):
    env = build(data, subject, grader=grader)
    for problem in env.test_problems():
        for letter in "ABCD":
            text = f"<reasoning>\nA is too large, B fits.\n</reasoning>\n<answer>\n{letter}\n</answer>"
            grade = env.grade(problem, answering(text))
            known = grader == "official" or letter in "ABCD"[: problem.metadata["options"]]
            assert (grade.reward, grade.correct_format) == (letter == problem.answer, known)


def test_two_hundred_questions_of_biology_have_two_options(data):
    env = build(data, "biology")
    problems = [*env.train_problems(), *env.test_problems()]
    assert [p.metadata["options"] for p in problems].count(2) == 200
