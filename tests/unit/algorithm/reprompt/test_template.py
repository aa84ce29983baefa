"""What a teacher's prompt holds, where, and in which words."""

import pytest

from sdpo_megatron.algorithm.reprompt import PRESETS, RepromptSettings, Template
from sdpo_megatron.errors import ConfigError
from sdpo_megatron.records import Hints, Message, Problem
from sdpo_megatron.strict_yaml.load import parse

PROBLEM = Problem(
    id="p",
    messages=[
        Message(role="system", content="Be brief."),
        Message(role="user", content="First?"),
        Message(role="assistant", content="One."),
        Message(role="user", content="Second?"),
    ],
)
BOTH = Hints(solution="SOLUTION", feedback="REMARK", attempt="MINE")


def preset(name: str) -> Template:
    return RepromptSettings(preset=name).template  # type: ignore[arg-type]


def last(template: Template, hints: Hints) -> str:
    return template.show(PROBLEM, hints)[-1]["content"]


@pytest.mark.parametrize("name", PRESETS)
def test_system_messages_and_earlier_turns_stay_and_the_parts_come_in_order(name: str):
    messages = preset(name).show(PROBLEM, BOTH)
    assert messages[:3] == PROBLEM.messages[:3]
    assert messages[3]["content"].startswith("Second?")
    text = "\n\n".join(message["content"] for message in messages[3:])
    parts = (
        *("Second?", "Correct solution:", "SOLUTION", "feedback:", "REMARK", "attempt was:", "MINE"),
        preset(name).closing,
    )
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert PROBLEM.messages[-1]["content"] == "Second?"
    assert "feedback" not in str(preset(name).show(PROBLEM, Hints(solution="SOLUTION")))
    assert "solution" not in str(preset(name).show(PROBLEM, Hints(feedback="REMARK")))


def test_the_default_words_byte_for_byte():
    assert last(Template(), Hints(solution="4")) == (
        "Second?\n\nCorrect solution:\n\n4\n\n"
        "Now answer the original question in the form of the solution shown, and with nothing else."
    )
    assert last(Template(), Hints(feedback="no")) == (
        "Second?\n\nAn earlier attempt at this did not succeed. It received this feedback:\n\nno\n\n"
        "Now answer the original question correctly."
    )


def test_an_assistant_turn_is_followed_by_the_closing_words():
    assert preset("recipe").show(PROBLEM, Hints(solution="4", feedback="no"))[3:] == [
        Message(role="user", content="Second?"),
        Message(
            role="assistant",
            content="Correct solution:\n\n4\n\n"
            "An earlier attempt at this did not succeed. It received this feedback:\n\nno",
        ),
        Message(role="user", content="Now solve the original question correctly."),
    ]


def test_the_default_asks_for_the_solutions_form_and_no_preset_for_an_explanation():
    assert "form of the solution" in Template().closing
    for name in PRESETS:
        words = " ".join(preset(name).model_dump().values()).lower()
        assert not any(word in words for word in ("explain", "step by step", "think", "reason"))


def test_own_texts_take_the_place_of_a_presets():
    own = RepromptSettings.model_validate(
        {
            "preset": "paper",
            "template": {"question": "Q: {question}", "solution": "Look: {solution}!", "closing": ""},
        }
    ).template
    assert last(own, Hints(solution="4 {feedback} {{x}}")) == "Q: Second?\n\nLook: 4 {feedback} {{x}}!"
    assert last(own, Hints(feedback="no")).endswith(
        "feedback:\n\nno\n\nNow solve the original question correctly."
    )


def test_two_pairs_of_braces_stand_for_one():
    own = Template(closing=r"Write \boxed{{answer}}, \frac{1}{2} or {} or { it }.")
    assert last(own, Hints(solution="4")).endswith(r"Write \boxed{answer}, \frac{1}{2} or {} or { it }.")


@pytest.mark.parametrize(
    ("template", "line"),
    [
        (
            {"closing": "Now {answer}"},
            "reprompt.template.closing holds {answer}, which is no placeholder: there are {question}, {solution}, "
            "{feedback}, {attempt}; write {{answer}} for the characters {answer}.",
        ),
        (
            {"solution": "Look!"},
            "reprompt.template.solution holds {solution} 0 times; write it once, where it is to stand.",
        ),
        (
            {"question": ""},
            "reprompt.template.question holds {question} 0 times; write it once, where it is to stand.",
        ),
        (
            {"feedback": "{feedback} {feedback}"},
            "reprompt.template.feedback holds {feedback} 2 times; write it once, where it is to stand.",
        ),
        (
            {"closing": "Now {solution}"},
            "reprompt.template.closing holds {solution}; write it in reprompt.template.solution alone.",
        ),
        (
            {"layout": "assistant_turn", "closing_without_solution": ""},
            "reprompt.template.closing_without_solution is empty, but with reprompt.template.layout=assistant_turn it "
            "is the turn that the response answers; write one, or set reprompt.template.layout=user_turn.",
        ),
        (
            {"layout": "system"},
            "reprompt.template.layout is 'system' (text, from the default); it must be 'user_turn' or "
            "'assistant_turn'.",
        ),
        (
            {"closng": ""},
            "Unknown key 'reprompt.template.closng'. Did you mean 'reprompt.template.closing'? reprompt.template has: "
            "layout, question, solution, feedback, attempt, closing, closing_without_solution.",
        ),
    ],
)
def test_what_a_template_cannot_be(template: dict, line: str):
    with pytest.raises(ConfigError) as refused:
        parse(RepromptSettings, {"template": template}, {}, "reprompt")
    assert refused.value.message == line
