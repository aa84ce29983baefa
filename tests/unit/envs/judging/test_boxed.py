import time

import pytest

from sdpo_megatron.envs.judging.boxed import last_boxed


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{4}", "4"),
        (r"so $\boxed{ 4 }$.", "4"),
        (r"\boxed {4}", "4"),
        # the first is what the text took back; math-verify would merge both
        (r"\boxed{3} ... wait, \boxed{4}", "4"),
        (r"$\boxed{4}$ as \boxed{3} is wrong \boxed{4}", "4"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\left( 3, \frac{\pi}{2} \right)}", r"\left( 3, \frac{\pi}{2} \right)"),
        (r"\boxed{x^{2^{3}}} and {more}", "x^{2^{3}}"),
        # braces that TeX prints need not be in pairs
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.} }", r"\left\{ x \right."),
        (r"\boxed{\begin{pmatrix} 1 \\ 2 \\\end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \\\end{pmatrix}"),
        (r"\boxed{a \\} b}", r"a \\"),
        (r"\boxed{\boxed{4}}", "4"),
        (r"\fbox{4}", "4"),
        ("\\boxed{\n4\n}", "4"),
        (r"\boxed{}", ""),
        (r"\boxed 5", "5"),
        (r"$\boxed5$", "5"),
        (r"\boxed\pi", r"\pi"),
        # cut off inside the last box: an earlier one is not what the text ended with
        (r"\boxed{3} no, \boxed{4", None),
        (r"\boxed{\frac{1}{2}", None),
        (r"\boxed", None),
        (r"$\boxed$", None),
        (r"\boxedx{4}", None),
        (r"\box{4}", None),
        ("boxed{4}", None),
        ("The answer is 4.", None),
        ("", None),
    ],
)
def test_what_the_last_box_holds(text, answer):
    assert last_boxed(text) == answer


@pytest.mark.parametrize("text", [r"\boxed{" * 20_000, r"\boxed{" + "{" * 100_000, r"\boxed " * 20_000])
def test_a_text_that_never_closes_takes_no_time(text):
    before = time.process_time()
    assert last_boxed(text) is None
    assert time.process_time() - before < 5
