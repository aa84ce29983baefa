import time

import pytest

from sdpo_megatron.envs.judging.choices import chosen, judge, judge_as_official

REASONED = "<reasoning>\nThe field falls with the square, so A is out.\n</reasoning>\n"

# (response, what it chooses of four options)
STYLES = [
    # tags, as SciKnowEval's system prompt asks for
    ("<reasoning>\nBy Gauss.\n</reasoning>\n<answer>\nB\n</answer>", "B"),
    (REASONED + "<answer>\nB\n</answer>", "B"),
    ("<answer>B</answer>", "B"),
    ("<answer>b</answer>", "B"),
    ("<answer> (B) </answer>", "B"),
    ("<answer>B.</answer>", "B"),
    ("<answer>B: 1.69</answer>", "B"),
    ("<answer>B) 56 pC</answer>", "B"),
    ("<answer>\n**B**\n</answer>", "B"),
    ("<answer>Option B</answer>", "B"),
    ("<answer>The correct answer is B.</answer>", "B"),
    ("<answer>\\boxed{B}</answer>", "B"),
    ("<answer>B", "B"),
    ("<ANSWER>B</ANSWER>", "B"),
    ("<answer>A</answer> No: <answer>B</answer>", "B"),
    ("The answer is C. <answer>B</answer>", "B"),
    ("<answer>1.69</answer> The answer is B.", None),
    ("<answer>C(=O)O</answer>", None),
    ("<answer>A or B</answer>", None),
    ("<answer></answer>", None),
    # boxes
    (r"\boxed{B}", "B"),
    (r"Thus $\boxed{\text{B}}$.", "B"),
    (r"\boxed{\textbf{(B)}}", "B"),
    (r"\boxed{\mathrm{B}}", "B"),
    (r"\boxed{B: 1.69}", "B"),
    (r"\boxed{A} ... no, \boxed{B}", "B"),
    (r"**Final Answer**: the final answer is $\boxed{B}$", "B"),
    (r"\boxed{1.69}", None),
    # statements
    ("The answer is B", "B"),
    ("The answer is B.", "B"),
    ("The answer is (B).", "B"),
    ("The answer is (b).", "B"),
    ("The answer is b.", "B"),
    ("The answer is: B", "B"),
    ("The correct answer is **B: 1.69**.", "B"),
    ("The correct answer is option B.", "B"),
    ("So the correct option is B because the charge is 56 pC.", "B"),
    ("The correct choice would be option (B) 56 pC, as shown.", "B"),
    ("Therefore, the right answer must be B!", "B"),
    ("The answer to the question is therefore B.", "B"),
    ("Answer: B", "B"),
    ("answer: b", "B"),
    ("ANSWER: B", "B"),
    ("**Answer:** B", "B"),
    ("**Answer: B**\n\nThe others are too large.", "B"),
    ("Answer: (B) 1.69", "B"),
    ("Answer: B. 1.69", "B"),
    ("Final Answer: B", "B"),
    ("### Final Answer\nB", "B"),
    ("Final answer: Option B", "B"),
    ("Answer B", "B"),
    ("Ans: B", "B"),
    ("My answer: 'B'", "B"),
    ('{"answer": "B"}', "B"),
    ("Answer = B", "B"),
    ("Ans. B", "B"),
    ("Answer B is right, answer A is wrong.", "B"),
    ("*B*", "B"),
    ("Answer -> B", "B"),
    ("答案：B", "B"),
    ("正确答案是（B）。", "B"),
    ("The answer is A. Wait, that is wrong. The answer is B.", "B"),
    ("If the answer is A, the field is zero. The answer is B.", "B"),
    ("I don't think the answer is A; the answer is B.", "B"),
    ("The wrong answer is A. I choose B.", "B"),
    ("The answer is A or B. Both fit, but I choose B.", "B"),
    ("I would go with B.", "B"),
    ("I'd pick option B, since it is the largest.", "B"),
    ("Option B is correct.", "B"),
    ("A is not correct. B is the correct answer.", "B"),
    ("(B) is the best choice", "B"),
    # a line
    ("B", "B"),
    (" b\n", "B"),
    ("B.", "B"),
    ("(B)", "B"),
    ("[B]", "B"),
    ("**B**", "B"),
    ("`B`", "B"),
    ("B) 1.69", "B"),
    ("B: 1.69", "B"),
    ("Ｂ", "B"),
    ("q = E r^2 / k = 56 pC.\n\nB", "B"),
    ("q = 56 pC.\n\n=> B", "B"),
    ("So it's 56 pC.\nTherefore, B.", "B"),
    ("B\n\nThe field of a point charge falls with the square.", "B"),
    ("It is 56 pC (B)", "B"),
    ("A: -0.01\nB: 1.69\nC: 2.49\nD: 0.45\n\nB", "B"),
    # several letters
    ("The correct answers are A and C.", "AC"),
    ("The answer is A and C.", "AC"),
    ("Answer: A, C, and D", "ACD"),
    ("Answer: C; A", "AC"),
    ("<answer>A, C</answer>", "AC"),
    ("<answer>AC</answer>", "AC"),
    (r"\boxed{A, C}", "AC"),
    # no choice
    ("", None),
    ("I do not know.", None),
    ("1.69", None),
    ("The answer is 1.69.", None),
    ("The answer is A or B.", None),
    ("The answer must be A, B, C, or D.", None),
    ("The answer is not B.", None),
    ("The answer isn't B.", None),
    ("The answer is E.", None),
    ("The answer is a matter of taste.", None),
    ("Answer: A force acts on it", None),
    ("The answer is B cells", None),
    ("The answer is C(=O)O", None),
    ("The answer is D = 3 m", None),
    ("The answer is B-type", None),
    ("A: -0.01\nB: 1.69\nC: 2.49\nD: 0.45", None),
    ("A. too small\n\nB. fits\n\nC. too large\n\nD. no", None),
    ("A charged particle makes a field.", None),
    ("Because BAD is a word", None),
    ("BAD", None),
    ("That completes the answer. B is wrong.", None),
    ("Option: A is wrong.", None),
    ("A is wrong.", None),
    ("C. elegans", None),
    ("The answer is C. elegans.", None),
    ("B. increases", "B"),
    ("The answer is C. C. elegans has 302 neurons.", "C"),
]


@pytest.mark.parametrize(("text", "letters"), STYLES)
def test_what_a_response_chooses(text, letters):
    assert chosen(text, 4) == letters


@pytest.mark.parametrize("options", range(2, 11))
def test_two_to_ten_options(options):
    letters = "ABCDEFGHIJ"
    for number, letter in enumerate(letters):
        expected = letter if number < options else None
        for text in (
            "<answer>%s</answer>",
            "\\boxed{%s}",
            "The answer is %s.",
            "%s",
            "(%s)",
            "Answer: %s) 5",
        ):
            assert chosen(text % letter, options) == expected, text % letter
    assert chosen("I think that the answer is A.", options) == "A"


@pytest.mark.parametrize("text", ["I choose none", "I", "F = ma", "E. coli", "Answer: J/mol"])
def test_letters_of_more_options_are_words_and_formulas(text):
    assert chosen(text, 10) == ("I" if text == "I" else None)


@pytest.mark.parametrize("options", [0, 1, 11])
def test_other_numbers_of_options_are_refused(options):
    with pytest.raises(ValueError, match=f"{options} options; there can be 2 to 10"):
        chosen("A", options)


@pytest.mark.parametrize(
    ("text", "reward", "tagged"),
    [
        (REASONED + "<answer>\nB\n</answer>", 1, True),
        ("<answer>B</answer>\n", 1, True),
        ("<answer>A</answer>", 0, True),
        ("<answer>b</answer>", 1, False),
        ("<answer>(B)</answer>", 1, False),
        ("<answer>B</answer> That is all.", 1, False),
        ("<answer>A</answer><answer>B</answer>", 1, False),
        ("<answer>B", 1, False),
        ("B", 1, False),
        ("\\boxed{A}", 0, False),
        ("<answer>A, B</answer>", 0, True),
    ],
)
def test_the_format_is_judged_apart_from_the_choice(text, reward, tagged):
    grade = judge(text, "B", 4, tags=True)
    assert (grade.reward, grade.correct_format) == (reward, tagged)
    assert judge(text, "B", 4, tags=False).correct_format
    assert bool(grade.feedback) == (reward == 0) and "B is" not in grade.feedback.replace("A, B is", "")


def test_no_choice_scores_0_in_a_wrong_format_and_says_so():
    grade = judge("1.69", "B", 4, tags=False)
    assert (grade.reward, grade.correct_format) == (0, False)
    assert grade.feedback == "The response chooses none of the options A to D."


def test_several_letters_are_right_together():
    assert judge("The answer is C and A.", "AC", 4, tags=False).reward == 1
    assert judge("The answer is A.", "AC", 4, tags=False).reward == 0
    assert judge("The answer is A, B and C.", "AC", 4, tags=False).reward == 0


@pytest.mark.parametrize(
    ("text", "reward", "correct_format"),
    [
        (REASONED + "<answer>\nB\n</answer>", 1, True),
        ("<answer>B</answer>\n", 1, True),
        ("<answer>B</answer> ", 1, False),
        ("<answer>A</answer>", 0, True),
        ("<answer>A</answer> <answer>B</answer>", 1, True),
        ("<answer>b</answer>", 0, False),
        ("<answer>(B)</answer>", 0, False),
        ("<answer>B", 1, False),
        ("B</answer>", 1, False),
        (" B\n", 1, False),
        ("The answer is B", 0, False),
        ("", 0, False),
    ],
)
def test_the_official_grader(text, reward, correct_format):
    """Each value is what the published grader returned for this text, with its format flag turned round."""
    grade = judge_as_official(text, "B")
    assert (grade.reward, grade.correct_format, grade.feedback) == (reward, correct_format, "")


@pytest.mark.parametrize(
    "text",
    [
        "A, " * 20_000,
        "answer is " * 10_000,
        "<answer>" * 10_000,
        "the answer to " * 8_000,
        "- " * 40_000,
        " " * 60_000,
        "A\n" * 30_000,
        "option " * 12_000,
        "so, " * 20_000,
        "choose the option: " * 5_000,
        "answer" + "\n" * 50_000,
        "A" * 60_000,
        "(" * 60_000,
    ],
)
def test_no_text_takes_long(text):
    before = time.process_time()
    judge(text, "B", 10, tags=True)
    judge_as_official(text, "B")
    assert time.process_time() - before < 10
