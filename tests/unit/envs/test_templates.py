"""What a teacher's prompt holds, where, and in which words."""

import pytest

from sdpo_megatron.envs.jsonl import JsonlOptions, JsonlProblems
from sdpo_megatron.envs.templates import DEFAULT, TEMPLATES, TemplateSettings
from sdpo_megatron.errors import ConfigError
from sdpo_megatron.records import Message, Problem
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


def last(settings: TemplateSettings, solution: str | None, feedback: str | None) -> str:
    return settings.template().show(PROBLEM, solution, feedback)[-1]["content"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_preset_extends_the_last_user_turn_only(name):
    messages = TEMPLATES[name].show(PROBLEM, "SOLUTION", "REMARK")
    assert messages[:-1] == PROBLEM.messages[:-1]
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user"]
    text = messages[-1]["content"]
    parts = ("Second?", "Correct solution:", "SOLUTION", "feedback:", "REMARK", TEMPLATES[name].closing)
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert PROBLEM.messages[-1]["content"] == "Second?"
    assert "feedback" not in TEMPLATES[name].show(PROBLEM, "SOLUTION", None)[-1]["content"]
    assert "solution" not in TEMPLATES[name].show(PROBLEM, None, "REMARK")[-1]["content"]


def test_the_default_asks_for_the_solutions_form_and_no_preset_for_an_explanation():
    assert "form of the solution" in DEFAULT.closing
    for template in TEMPLATES.values():
        words = " ".join(vars(template).values()).lower()
        assert not any(word in words for word in ("explain", "step by step", "think", "reason"))


def test_own_texts_take_the_place_of_a_presets():
    own = TemplateSettings(name="paper", solution="Look: {solution}!", closing="")
    assert last(own, "4 {feedback}", None) == "Second?\n\nLook: 4 {feedback}!"
    assert last(own, None, "no").endswith("feedback:\n\nno\n\nNow solve the original question correctly.")


@pytest.mark.parametrize(
    ("template", "line"),
    [
        (
            {"solution": "Look!"},
            "task.options.template.solution holds {solution} 0 times; write it once, where it is to stand.",
        ),
        (
            {"feedback": "{feedback} {feedback}"},
            "task.options.template.feedback holds {feedback} 2 times; write it once, where it is to stand.",
        ),
        (
            {"closing": "Now {solution}"},
            "task.options.template.closing holds {solution} 1 times; write it in template.solution alone.",
        ),
        (
            {"name": "papers"},
            "task.options.template.name is 'papers' (text, from the default); it must be 'default' or 'paper'.",
        ),
        (
            {"closng": ""},
            "Unknown key 'task.options.template.closng'. Did you mean 'task.options.template.closing'? "
            "task.options.template has: name, solution, feedback, closing, closing_without_solution.",
        ),
    ],
)
def test_what_a_template_cannot_be(template, line):
    with pytest.raises(ConfigError) as refused:
        parse(JsonlOptions, {"train_file": "x", "template": template}, {}, "task.options")
    assert refused.value.message == line


def test_problem_files_are_shown_in_the_template_that_is_set(tmp_path):
    (tmp_path / "a").write_text('{"prompt": "2 + 2?", "answer": "4"}\n')
    options = JsonlOptions(train_file=str(tmp_path / "a"), template=TemplateSettings(closing="Go."))
    env = JsonlProblems(options)
    assert (
        env.show(env.train_problems()[0], "4", None)[-1]["content"]
        == "2 + 2?\n\nCorrect solution:\n\n4\n\nGo."
    )
