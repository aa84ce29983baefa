import json

import pytest

from sdpo_megatron.envs.multiple_choice import (
    RECIPE_SYSTEM,
    MultipleChoice,
    MultipleChoiceOptions,
    official_system,
)
from sdpo_megatron.errors import UserError
from tests.graders import answering

OWN = {"question": "What boils first?", "options": ["water", "ethanol", "both"], "answer": "B"}
PUBLISHED = {
    "idx": 96,
    "kind": "mcq",
    "answer": "C",
    "prompt": "What is 2 + 2?\n\nHint: count.\n\nA: 3\nB: 5\nC: 4\nD: a\n\nb\nPlease reason step by step.",
    "system": "The file's own words.",
}


def write(path, *lines) -> str:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def build(path, *lines, **options) -> MultipleChoice:
    return MultipleChoice(MultipleChoiceOptions(train_file=write(path / "train", *lines), **options))


def test_an_own_line_becomes_a_question_with_lettered_options(tmp_path):
    env = build(tmp_path, OWN, {**OWN, "id": "x", "answer": "C, A"})
    first, second = env.train_problems()
    assert [m["role"] for m in first.messages] == ["system", "user"]
    assert first.messages[1]["content"] == (
        "What boils first?\n\nA: water\nB: ethanol\nC: both\nPlease reason step by step."
    )
    assert "three options" in first.messages[0]["content"] and "(A, B, or C)" in first.messages[0]["content"]
    assert (first.id, first.answer, second.id, second.answer) == ("1", "B", "x", "AC")
    assert env.test_problems() == []


def test_a_published_line_is_asked_as_it_stands_in_its_file(tmp_path):
    (problem,) = build(tmp_path, PUBLISHED).train_problems()
    assert [m["content"] for m in problem.messages] == [PUBLISHED["system"], PUBLISHED["prompt"]]
    assert (problem.id, problem.answer, problem.metadata) == ("96", "C", {"options": 4})


@pytest.mark.parametrize("line", [OWN, PUBLISHED])
def test_the_variants_of_the_prompt(tmp_path, line):
    (official,) = build(tmp_path, line).train_problems()
    (recipe,) = build(tmp_path, line, prompt="recipe").train_problems()
    (bare,) = build(tmp_path, line, prompt="bare").train_problems()
    assert recipe.messages[0]["content"] == RECIPE_SYSTEM
    assert recipe.messages[1:] == official.messages[1:]
    text = official.messages[1]["content"].removesuffix("\nPlease reason step by step.")
    assert [(m["role"], m["content"]) for m in bare.messages] == [("user", text)]


def test_the_official_system_turn_for_other_numbers_of_options():
    assert "two options" in official_system(2) and "(A or B)" in official_system(2)
    assert "ten options" in official_system(10) and "H, I, or J)" in official_system(10)


@pytest.mark.parametrize(
    ("options", "text", "reward", "correct_format"),
    [
        ({}, "<reasoning>\nHm.\n</reasoning>\n<answer>\nB\n</answer>", 1, True),
        ({}, "<answer>C</answer>", 0, True),
        ({}, "The answer is B.", 1, False),
        ({"prompt": "bare"}, "The answer is B.", 1, True),
        ({"prompt": "bare"}, "ethanol", 0, False),
        ({}, "<answer>D</answer>", 0, False),
        ({"grader": "official"}, "<answer>\nB\n</answer>", 1, True),
        ({"grader": "official"}, "The answer is B.", 0, False),
        ({"grader": "official"}, "B", 1, False),
    ],
)
def test_reward_and_format(tmp_path, options, text, reward, correct_format):
    env = build(tmp_path, OWN, **options)
    grade = env.grade(env.train_problems()[0], answering(text))
    assert (grade.reward, grade.correct_format) == (reward, correct_format)


def test_ten_options_and_several_right_letters(tmp_path):
    env = build(tmp_path, {"question": "Which?", "options": list("abcdefghij"), "answer": "JA"})
    (problem,) = env.train_problems()
    assert problem.messages[1]["content"].endswith("\nJ: j\nPlease reason step by step.")
    assert env.grade(problem, answering("<answer>A, J</answer>")).reward == 1
    assert env.grade(problem, answering("<answer>J</answer>")).reward == 0


def test_held_out_problems_have_their_file(tmp_path):
    env = build(tmp_path, OWN, test_file=write(tmp_path / "test", PUBLISHED))
    assert [p.id for p in env.test_problems()] == ["96"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"question": "q", "options": ["a", "b"]}, "'answer' is missing; add it."),
        (
            {"question": "q", "options": ["a", "b"], "anwser": "A"},
            "unknown key 'anwser'. Did you mean 'answer'?",
        ),
        ({"options": ["a", "b"], "answer": "A"}, "'question' is missing; add it."),
        ({"question": "q", "answer": "A"}, "'options' is missing; add it."),
        (
            {"question": "q", "options": ["a"], "answer": "A"},
            "'options' is ['a']: list should have at least 2",
        ),
        ({"question": "q", "options": ["x"] * 11, "answer": "A"}, "list should have at most 10 items"),
        (
            {"question": "q", "options": ["a", 2], "answer": "A"},
            "'options.1' is 2: input should be a valid string",
        ),
        (
            {**OWN, "answer": "D"},
            "'answer' is 'D'; write the letter of one of the 3 options, A to C, or several.",
        ),
        ({**OWN, "answer": "b"}, "'answer' is 'b'; write the letter"),
        ({**OWN, "answer": "ethanol"}, "'answer' is 'ethanol'; write the letter"),
        ({**OWN, "answer": "BB"}, "'answer' is 'BB'; write the letter"),
        ({**OWN, "answer": ""}, "'answer' is ''; write the letter"),
        (
            {"idx": 1, "prompt": "Why?", "answer": "A"},
            "'prompt' does not end with a blank line, two to 10 options",
        ),
        (
            {**PUBLISHED, "prompt": "Why?\n\nA: x\nC: y\nPlease reason step by step."},
            "'prompt' does not end with",
        ),
        ({**PUBLISHED, "prompt": "Why?\n\nA: x\nPlease reason step by step."}, "'prompt' does not end with"),
        ({**PUBLISHED, "answer": "E"}, "'answer' is 'E'; write the letter of one of the 4 options, A to D"),
        ({k: v for k, v in PUBLISHED.items() if k != "idx"}, "'idx' is missing; add it."),
        ("[1]", 'not a JSON object; write {"question"'),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path, line, message):
    with pytest.raises(UserError) as error:
        build(tmp_path, OWN, "", line)
    assert str(error.value).startswith(f"{tmp_path / 'train'} line 3: ")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_two_questions_of_one_id_are_named(tmp_path):
    with pytest.raises(UserError, match="line 2: id '96' is that of line 1 too; give it its own"):
        build(tmp_path, PUBLISHED, PUBLISHED)
