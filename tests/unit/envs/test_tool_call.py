import json

import pytest

from sdpo_megatron.envs.tool_call import ToolCall, ToolCallOptions
from sdpo_megatron.errors import UserError
from tests.graders import answering

# as ToolUse's files have it
LINE = {
    "idx": 4072,
    "kind": "tooluse",
    "system": None,
    "prompt": "Use the tools. Question: Change the picture of g-user123.",
    "answer": json.dumps(
        [{"Action": "updateUser", "Action_Input": '{"userId": "g-user123", "profile": {"picture": "x"}}'}]
    ),
}
RIGHT = (
    'Thought: Now.\nAction: updateUser\nAction Input: {"profile": {"picture": "x"}, "userId": "g-user123"}'
)


def build(path, *lines, **options) -> ToolCall:
    (path / "train").write_text("\n".join(json.dumps(line) for line in lines))
    return ToolCall(ToolCallOptions(train_file=str(path / "train"), **options))


def test_a_line_becomes_a_problem(tmp_path):
    own = {"prompt": "p", "answer": [{"Action": "f", "Action_Input": {"a": [1]}}], "id": "x", "system": "s"}
    published, mine = build(tmp_path, LINE, own).train_problems()
    assert [(m["role"], m["content"]) for m in published.messages] == [("user", LINE["prompt"])]
    assert (published.id, published.answer) == ("4072", LINE["answer"])
    assert [m["role"] for m in mine.messages] == ["system", "user"]
    assert mine.id == "x" and json.loads(mine.answer) == own["answer"]


@pytest.mark.parametrize("grader", ["default", "official"])
def test_calls_are_compared_as_values(tmp_path, grader):
    env = build(tmp_path, LINE, grader=grader, test_file=str(tmp_path / "train"))
    (problem,) = env.test_problems()
    nested_is_read = grader == "default"
    assert env.grade(problem, answering(RIGHT)).reward == nested_is_read
    wrong = env.grade(problem, answering(RIGHT.replace('"x"', '"y"')))
    assert wrong.reward == 0 and wrong.feedback
    assert ("g-user123" in wrong.feedback) != nested_is_read, "the official feedback tells the right call"
    assert not env.grade(problem, answering("I cannot.")).correct_format


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"answer": LINE["answer"]}, "'prompt' is missing; add it."),
        ({"prompt": "p"}, "'answer' is missing; add it."),
        ({"prompt": "p", "answers": "[]"}, "'answer' is missing; is it 'answers'?"),
        ({"prompt": "", "answer": LINE["answer"]}, "'prompt' is '': string should have at least 1"),
        ({"prompt": "p", "answer": "f(x)"}, "'answer': The answer is not JSON. Write {"),
        ({"prompt": "p", "answer": []}, "'answer': The answer is not a JSON list of at least one call."),
        ({"prompt": "p", "answer": [{"Action": "f"}]}, "Call 1 of the answer is not an object of Action and"),
    ],
)
def test_a_line_that_is_no_problem_is_named(tmp_path, line, message):
    with pytest.raises(UserError) as error:
        build(tmp_path, LINE, line)
    assert str(error.value).startswith(f"{tmp_path / 'train'} line 2: ") and message in str(error.value)
