import json
import threading
import time

import pytest
from math_verify import verify

from sdpo_megatron.envs import math_answer
from sdpo_megatron.envs.math_answer import MathAnswer, MathAnswerOptions
from sdpo_megatron.errors import UserError
from sdpo_megatron.records import FinishReason
from tests.graders import answering

# A row of each published form; of MATH's training set and of AIME 25 no real one was at hand.
MATH_TRAIN = {
    "problem": "What is the vertex of $y = x^2$?",
    "level": "Level 2",
    "type": "Algebra",
    "solution": r"The axis is \boxed{x = 0}, and so the vertex is $\boxed{\left(0, 0\right)}.$",
}
MATH_500 = {
    "problem": "Half?",
    "solution": r"$\boxed{\frac12}$",
    "answer": r"\frac{1}{2}",
    "unique_id": "test/1",
}
GSM8K = {"question": "How much?", "answer": "She sells 16 - 7 = <<16-7=9>>9.\n#### 1,000"}
AIME_24 = {"id": 60, "problem": "Find m.", "question": "Find m.", "answer": "033", "solution": r"\boxed{33}"}
AIME_25 = {"id": "17", "problem": "Find n.", "answer": 70}


def build(path, *lines, **options) -> MathAnswer:
    (path / "train").write_text("\n".join(json.dumps(line) for line in lines))
    return MathAnswer(MathAnswerOptions(train_file=str(path / "train"), **options))


def grade(path, answer, text, finish_reason: FinishReason = "stop", **options):
    env = build(path, {"question": "q", "answer": answer}, **options)
    return env.grade(env.train_problems()[0], answering(text, finish_reason))


def test_lines_of_each_published_form(tmp_path):
    problems = build(tmp_path, MATH_TRAIN, MATH_500, GSM8K, AIME_24, AIME_25).train_problems()
    assert [(p.id, p.answer) for p in problems] == [
        ("1", r"\left(0, 0\right)"),
        ("test/1", r"\frac{1}{2}"),
        ("3", "1,000"),
        ("60", "033"),
        ("17", "70"),
    ]
    assert problems[2].messages == [
        {
            "role": "user",
            "content": "How much?\n\nPlease reason step by step, and put your final answer within \\boxed{}.",
        }
    ]


def test_the_instruction_and_the_held_out_file_are_the_user_s(tmp_path):
    (tmp_path / "test").write_text(json.dumps(AIME_25))
    env = build(tmp_path, GSM8K, instruction="", test_file=str(tmp_path / "test"))
    assert env.train_problems()[0].messages[0]["content"] == "How much?"
    assert [p.answer for p in env.test_problems()] == ["70"]


@pytest.mark.parametrize(
    ("answer", "box", "reward"),
    [
        ("033", "33", 1),
        ("33", "033", 1),
        ("033", "33.0", 1),
        ("033", "330", 0),
        ("1,000", "1000", 1),
        ("1000", r"\$1,000", 1),
        ("1000", r"1000\text{ dollars}", 1),
        ("1000", "100", 0),
        (r"\frac{1}{2}", "0.5", 1),
        (r"\frac{1}{2}", "1/2", 1),
        (r"\frac{1}{2}", "0.49", 0),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)", 1),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(\pi/2, 3)", 0),
        ("4", "x=4", 1),
        ("p - q", "-q + p", 1),
        ("p - q", "q - p", 0),
        (r"3\sqrt{13}", r"\sqrt{117}", 1),
        (r"\text{Evelyn}", "Evelyn", 1),
        (r"\text{Evelyn}", "Briana", 0),
        ("1,2,3", "3, 1, 2", 1),
        ("1,2,3", "1, 2", 0),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}", 1),
        (r"2^{10}", "1024", 1),
        ("3", "2" * 6000, 0),
        ("2", r"\frac{4}{", 0),
    ],
)
def test_answers_are_compared_as_mathematics(tmp_path, answer, box, reward):
    graded = grade(tmp_path, answer, f"So the answer is $\\boxed{{{box}}}$.")
    assert graded.reward == reward
    assert (graded.feedback == "") == (reward == 1) and len(graded.feedback) < 250
    if reward == 0:
        assert answer not in graded.feedback.removeprefix(box), "the feedback does not tell the answer"


def test_the_last_box_counts(tmp_path):
    assert grade(tmp_path, "4", r"\boxed{3} ... wait, \boxed{4}").reward == 1
    assert grade(tmp_path, "3", r"\boxed{3} ... wait, \boxed{4}").reward == 0
    assert grade(tmp_path, "3", r"\boxed{3} ... wait, \boxed{").reward == 0


@pytest.mark.parametrize("text", ["The answer is 9.", "$9$", "#### 9", ""])
def test_an_answer_outside_of_a_box(tmp_path, text):
    strict = grade(tmp_path, "9", text)
    assert (strict.reward, strict.correct_format) == (0, False)
    assert strict.feedback == r"The response does not put its answer into \boxed{}."
    lenient = grade(tmp_path, "9", text, require_box=False)
    assert (lenient.reward, lenient.correct_format) == (bool(text), False)
    assert grade(tmp_path, "8", text, require_box=False).reward == 0


def test_without_its_box_a_truncated_response_is_told_to_be_shorter(tmp_path):
    for text in ("Let me see", r"So \boxed{9"):
        told = grade(tmp_path, "9", text, "length")
        assert (told.reward, told.correct_format) == (0, False) and "cut off" in told.feedback
    assert grade(tmp_path, "9", r"So \boxed{9", require_box=False).reward == 0


def test_the_feedback_tells_what_was_compared_where_it_may(tmp_path):
    assert grade(tmp_path, "4", r"\boxed{5}").feedback == "5 is wrong."
    told = grade(tmp_path, "4", r"\boxed{5}", feedback_shows_answer=True)
    assert told.feedback == "5 is not equal to the right answer, 4."


def test_what_takes_too_long_to_compare_is_no_wrong_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(math_answer, "_LIMIT_S", 1)
    before = time.monotonic()
    with pytest.raises(TimeoutError, match=r"math-verify compared .*9\^\{9\^\{9\}\}.* with '1' for 1 s"):
        grade(tmp_path, "1", r"\boxed{9^{9^{9}}}")
    assert time.monotonic() - before < 3


def test_outside_of_the_main_thread_it_raises_and_does_not_score_0(tmp_path):
    caught: list[Exception] = []

    def run():
        try:
            grade(tmp_path, "4", r"\boxed{4}")
        except RuntimeError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert len(caught) == 1 and "the main thread's alone" in str(caught[0])


def test_it_is_warm_before_the_first_grade(tmp_path, monkeypatch):
    env = build(tmp_path, GSM8K)
    limits: list[int] = []

    def recorded(*values, timeout_seconds, **others):
        limits.append(timeout_seconds)
        return verify(*values, timeout_seconds=timeout_seconds, **others)

    monkeypatch.setattr(math_answer, "verify", recorded)
    env.warm_up()
    assert limits and min(limits) >= 60, "on a busy machine what is loaded takes longer than an answer may"
    before = time.process_time()
    assert env.grade(env.train_problems()[0], answering(r"\boxed{1000}")).reward == 1
    assert time.process_time() - before < 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"answer": "4"}, "'question' (or 'problem') is missing or empty; add it."),
        ({"question": "q"}, "'answer' (or 'solution') is missing; add it."),
        ({"question": "q", "answer": " "}, "'answer' is empty; write one."),
        ({"question": "q", "answer": "18\n####"}, "'answer' is empty; write one."),
        ({"question": "q", "answer": ["4"]}, "'answer"),
        ({"question": 4, "answer": "4"}, "'question' is 4: input should be a valid string."),
        ({"problem": "q", "solution": "It is 4."}, r"'solution' holds no answer in \boxed{}; add 'answer'."),
    ],
)
def test_a_line_that_is_no_problem_is_named(tmp_path, line, message):
    with pytest.raises(UserError) as error:
        build(tmp_path, GSM8K, line)
    assert str(error.value).startswith(f"{tmp_path / 'train'} line 2: ") and message in str(error.value)
