import json

import pytest

from sdpo_megatron.algorithm.reprompt import Template
from sdpo_megatron.envs.jsonl import JsonlOptions, JsonlProblems
from sdpo_megatron.errors import UserError
from sdpo_megatron.records import Hints, Message, Problem
from tests.graders import answering

GOOD = '{"prompt": "2 + 2?", "answer": "4"}'


def write(path, *lines: str):
    path.write_bytes("\n".join(lines).encode())
    return path


def read(path) -> list[Problem]:
    return list(JsonlProblems(JsonlOptions(train_file=str(path))).train_problems())


def test_every_field(tmp_path):
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "ü"}]
    full = {
        "id": "x",
        "messages": turns,
        "answer": "4",
        "grader": "last_number",
        "canonical": True,
        "metadata": {"level": [1]},
    }
    problems = read(write(tmp_path / "a", GOOD, "", json.dumps(full)))
    assert problems == [
        Problem(id="1", messages=[Message(role="user", content="2 + 2?")], answer="4", grader="exact"),
        Problem(
            id="x",
            messages=[Message(role="system", content="s"), Message(role="user", content="ü")],
            answer="4",
            grader="last_number",
            canonical=True,
            metadata={"level": [1]},
        ),
    ]


def test_a_byte_order_mark_before_a_blank_line(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbf\r\n" + GOOD.encode())
    assert [problem.id for problem in read(tmp_path / "a")] == ["2"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "{",
            "not JSON (Expecting property name enclosed in double quotes at column 2); write one JSON object",
        ),
        (
            f'{{"prompt": "x", "answer": {"9" * 5000}}}',
            "not JSON that can be read (Exceeds the limit (4300 digits)",
        ),
        (f'{{"prompt": "x", "answer": {"[" * 100_000}', "not JSON that can be read (maximum recursion depth"),
        (
            '{"prompt": "\\ud800", "answer": "4"}',
            "half a character (a surrogate) is escaped there; correct it.",
        ),
        ("[1]", 'not a JSON object; write {"prompt": ..., "answer": ...}.'),
        (
            '{"promt": "x", "answer": "y"}',
            "unknown key 'promt'. Did you mean 'prompt'? Known: id, prompt, mess",
        ),
        ('{"prompt": "x"}', "'answer' is missing; add it."),
        ('{"prompt": "x", "answer": [4]}', "'answer' is [4]: input should be a valid string."),
        ('{"answer": "4"}', "write either 'prompt' or 'messages'."),
        ('{"prompt": "x", "messages": [], "answer": "4"}', "write either 'prompt' or 'messages'."),
        ('{"messages": [], "answer": "4"}', "'messages' must end with a turn whose role is user."),
        (
            '{"messages": [{"role": "assistant", "content": "x"}], "answer": "4"}',
            "'messages' must end with a turn whose role is user.",
        ),
        (
            '{"messages": [{"role": "bot", "content": "x"}], "answer": "4"}',
            "'messages.0.role' is 'bot': input",
        ),
        (
            '{"prompt": "x", "answer": "y", "grader": "exakt"}',
            "There is no grader 'exakt'. Did you mean 'exact'? There are: equation, exact, last_number.",
        ),
        (
            '{"prompt": "x", "answer": "four", "grader": "last_number"}',
            "the grader last_number compares numbers, but this answer holds none; correct the answer or name",
        ),
        ('{"id": "1", "prompt": "x", "answer": "y"}', "id '1' is that of line 1 too; give it its own."),
        ('{"id": "", "prompt": "x", "answer": "y"}', "'id' is '': string should have at least 1 character."),
        (
            '{"prompt": "x", "answer": "y", "grader": ""}',
            "'grader' is '': string should have at least 1 character.",
        ),
        ('{"prompt": "x", "answer": "y", "answer": "z"}', "the key 'answer' is there twice; remove one."),
        ('{"prompt": "x", "answer": " "}', "the answer is empty; write one."),
    ],
)
def test_a_mistake_is_named_with_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "problems.jsonl", GOOD, "", line)
    with pytest.raises(UserError) as error:
        read(path)
    assert str(error.value).startswith(f"{path} line 3: {message}")
    assert "\n" not in str(error.value)


def test_an_id_that_is_a_later_lines_number(tmp_path):
    path = write(tmp_path / "a", '{"id": "2", "prompt": "x", "answer": "y"}', GOOD)
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value) == (
        f"{path} line 2: id '2' is that of line 1 too, which a line without an id has for its number; give it its own."
    )


def test_bytes_that_are_not_text(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b'{"prompt": "\xff", "answer": "4"}')
    with pytest.raises(UserError, match="line 1: not UTF-8"):
        read(path)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file(tmp_path, content):
    path = write(tmp_path / "a", content)
    with pytest.raises(UserError) as error:
        read(path)
    assert str(error.value) == (
        f'{path} holds no problem: write one JSON object per line, {{"prompt": ..., "answer": ...}}.'
    )


def test_a_missing_file_and_a_directory(tmp_path):
    with pytest.raises(UserError, match="There is no problem file .*nowhere"):
        read(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is a directory"):
        read(tmp_path)


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path):
    path = write(tmp_path / "a", '{"prompt": "a\u2028b", "answer": "4"}')
    assert read(path)[0].messages[0]["content"] == "a\u2028b"


def test_the_environment(tmp_path):
    train = write(tmp_path / "train", GOOD, GOOD)
    test = write(tmp_path / "test", GOOD)
    options = JsonlOptions(train_file=str(train), test_file=str(test), grader="last_number")
    environment = JsonlProblems(options)
    assert (len(environment.train_problems()), len(environment.test_problems())) == (2, 1)
    problem = environment.train_problems()[0]
    assert environment.grade(problem, answering("It is 4")).reward == 1
    assert "It is 4" in environment.show(problem, Hints(solution="It is 4"), Template())[-1]["content"]
    assert list(JsonlProblems(JsonlOptions(train_file=str(train))).test_problems()) == []
    with pytest.raises(UserError, match=r"no grader \(task.options.grader\) 'x'"):
        JsonlProblems(JsonlOptions(train_file=str(train), grader="x"))


def test_a_file_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a", GOOD)
    assert len(JsonlProblems(JsonlOptions(train_file="~/a", test_file="~/a")).test_problems()) == 1
