"""Tokenizer, chat template and every problem are looked at before anything starts."""

import json
from pathlib import Path
from typing import Any

import pytest

from sdpo_megatron.chat import load_chat
from sdpo_megatron.envs.equations import Equations, EquationsOptions
from sdpo_megatron.preflight import conversations, findings
from sdpo_megatron.train import main
from tests.byte_tokenizer import CHAT_TEMPLATE, write_tokenizer
from tests.unit.launch.launching import Project, make_project


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setattr(findings, "_cache", lambda: tmp_path / "checked")
    project = make_project(tmp_path)
    write_problems(project, [{"prompt": f"What is {k}?", "answer": str(k)} for k in range(20)])
    return project


def write_problems(project: Project, lines: list[dict[str, Any]]) -> None:
    named = [{"id": f"p{k}", "grader": "exact", **line} for k, line in enumerate(lines)]
    (project.path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in named))


def check(project: Project, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line, without the project's path; empty where all is in order."""
    task = f"task={{env: jsonl, options: {{train_file: {project.path / 't.jsonl'}}}}}"
    code = main([str(project.yaml), "--check", task, "rollout.problems_per_step=1", *arguments])
    said = capsys.readouterr()
    assert code == (2 if said.err else 0), said
    assert said.err.count("\n") <= 1
    return said.err.strip().replace(f"{project.path}/", "").removeprefix("error: ")


def test_what_is_in_order_is_looked_at_once(
    project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    looked: list[str] = []
    of_all = conversations.check_template_effects
    monkeypatch.setattr(
        conversations, "check_template_effects", lambda *all: (looked.append(""), of_all(*all))[1]
    )
    for expected, arguments in [(1, []), (1, []), (2, ["rollout.system_prompt=Short."]), (2, [])]:
        assert check(project, capsys, *arguments) == "" and len(looked) == expected
    write_problems(project, [{"prompt": f"How much is {k}?", "answer": str(k)} for k in range(20)])
    assert check(project, capsys) == "" and len(looked) == 3
    write_tokenizer(project.path / "model", CHAT_TEMPLATE + " ")
    assert check(project, capsys) == "" and len(looked) == 4


def test_the_cache_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(findings, "_cache", lambda: tmp_path / "checked")
    monkeypatch.setattr(findings, "KEPT", 3)
    for k in range(6):
        findings.remember(str(k))
    assert findings.is_known("5") and len(list((tmp_path / "checked").iterdir())) == 3
    monkeypatch.setattr(findings, "_cache", lambda: Path("/proc/nowhere"))
    findings.remember("1")


def test_a_prompt_that_leaves_no_room_is_named(project: Project, capsys: pytest.CaptureFixture[str]):
    write_problems(project, [{"prompt": "x" * size, "answer": "1"} for size in (10, 300, 240)])
    assert check(project, capsys) == (
        "2 of 3 problems leave no room for a response in model.max_context_length=256: the longest prompt, of p1, has "
        "319 tokens; raise model.max_context_length, or leave these problems out."
    )


def test_a_canonical_answer_that_does_not_fit_is_named(project: Project, capsys: pytest.CaptureFixture[str]):
    chat = load_chat(project.path / "model")
    env = Equations(EquationsOptions())
    most = 1 + max(len(chat.prompt_ids(p.messages)) for p in [*env.train_problems(), *env.test_problems()])
    assert (
        main([str(project.yaml), "--check", f"model.max_context_length={most}", "rollout.max_tokens=8"]) == 2
    )
    said = capsys.readouterr().err
    assert (
        f"and its canonical answer have {most + 12} tokens, more than model.max_context_length={most}; "
        in said
    )


BEYOND = (
    "has the token '[PAD]', whose id 1026 is not among the model's 1026 (vocab_size in config.json): leave that text "
    "out, or take the tokenizer that belongs to the model."
)


def test_ids_beyond_the_vocabulary(project: Project, capsys: pytest.CaptureFixture[str]):
    write_tokenizer(project.path / "model", more=[("[PAD]", 1026)])
    assert check(project, capsys) == ""
    write_problems(project, [{"prompt": "a", "answer": "b"}, {"prompt": "Say [PAD].", "answer": "c"}])
    assert check(project, capsys) == f"the prompt of problem p1 {BEYOND}"
    write_problems(project, [{"prompt": "a", "answer": "[PAD]"}])
    assert check(project, capsys) == f"the answer of problem p0 {BEYOND}"
    write_problems(project, [{"prompt": "a", "answer": "b"}])
    write_tokenizer(project.path / "model", "[PAD]" + CHAT_TEMPLATE, more=[("[PAD]", 1026)])
    assert "token ids up to 1026, but config.json says vocab_size 1026" in check(project, capsys)


def test_a_conversation_that_the_template_refuses(project: Project, capsys: pytest.CaptureFixture[str]):
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    write_tokenizer(project.path / "model", no_system + CHAT_TEMPLATE)
    assert check(project, capsys) == ""
    own = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "answer": "1"}
    write_problems(project, [*({"prompt": f"{k}", "answer": "1"} for k in range(20)), own])
    assert check(project, capsys) == (
        "problem p20 of task: The chat template in model refuses a conversation of the turns system, user: no system "
        "turn; change the problems, rollout.system_prompt or rollout.chat_template_kwargs."
    )


def test_problems_that_are_rendered_alike(project: Project, capsys: pytest.CaptureFixture[str]):
    write_tokenizer(project.path / "model", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert check(project, capsys) == (
        "The chat template in model renders the problems p0 and p1 alike, though they differ: it leaves out what they "
        "say; take the template that belongs to the model."
    )
    # the same problem twice, and one that differs in white space alone
    write_tokenizer(
        project.path / "model", CHAT_TEMPLATE.replace("message['content']", "message['content']|trim")
    )
    write_problems(project, [{"prompt": text, "answer": "1"} for text in ("a", "a", "a ")])
    assert check(project, capsys) == ""


@pytest.mark.parametrize(
    ("written", "right"),
    [
        ("enable_thinking: false", True),
        ("enable_thinking: true", True),
        ("enable_thinking: off", False),
        ("enable_thinkin: false", False),
        ("thinking_budget: 7", False),
        ("date: '2026'", False),
        ("style: plain", True),
        ("level: 2", True),
    ],
)
def test_arguments_of_the_template_that_change_nothing(
    project: Project, capsys: pytest.CaptureFixture[str], written: str, right: bool
):
    more = "{{ style | default('plain') }} {% if (level | default(2)) > 2 %}high{% endif %}"
    write_tokenizer(project.path / "model", CHAT_TEMPLATE + more)
    said = check(project, capsys, f"rollout.chat_template_kwargs={{{written}}}")
    name = written.partition(":")[0]
    assert said == "" if right else said.startswith(f"rollout.chat_template_kwargs.{name} is "), said
    assert right or "which changes nothing in the rendered conversation: correct its name" in said


@pytest.mark.parametrize(
    ("template", "line"),
    [
        (None, "The tokenizer in model has no chat template"),
        (
            "{% for m in",
            "The chat template in model refuses a conversation of the turns user, assistant: unexpected",
        ),
        ("{{ messages[7].content }}", "The chat template in model refuses a conversation"),
        (
            "{{ 1 // 0 }}",
            "The chat template in model refuses a conversation of the turns user, assistant: ZeroDiv",
        ),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "Reading the tokenizer in model takes more than",
        ),
    ],
)
def test_a_template_that_is_none(
    project: Project,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    template: str | None,
    line: str,
):
    monkeypatch.setattr(conversations, "TOKENIZER_LIMIT_S", 5.0)
    write_tokenizer(project.path / "model", template)
    assert check(project, capsys).startswith(line)


def test_arguments_that_break_the_template(project: Project, capsys: pytest.CaptureFixture[str]):
    write_tokenizer(project.path / "model", CHAT_TEMPLATE + "{{ 1 // (by | default(1)) }}")
    said = check(project, capsys, "rollout.chat_template_kwargs={by: 0}")
    assert "refuses a conversation of the turns" in said and "ZeroDivisionError" in said


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "model/tokenizer.json is empty"),
        (
            "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n",
            "model/tokenizer.json is a pointer",
        ),
        ('{"version": "1.0", "model": {"ty', "Reading the tokenizer in model failed ("),
        ("[1]", "Reading the tokenizer in model failed ("),
    ],
)
def test_a_tokenizer_that_is_none(project: Project, capsys: pytest.CaptureFixture[str], text: str, line: str):
    (project.path / "model" / "tokenizer.json").write_text(text)
    assert check(project, capsys).startswith(line)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (
            b'{"auto_map": {"AutoTokenizer": ["own.Tokenizer", null]}}',
            "auto_map names code of the tokenizer's own",
        ),
        (b"\xff\xfe", "model/tokenizer_config.json is not text in UTF-8; download it again."),
        (b"[", "Reading the tokenizer in model failed ("),
    ],
)
def test_a_tokenizer_config_that_is_none(
    project: Project, capsys: pytest.CaptureFixture[str], content: bytes, line: str
):
    (project.path / "model" / "tokenizer_config.json").write_bytes(content)
    assert line in check(project, capsys)


def test_templates_without_a_default(project: Project, capsys: pytest.CaptureFixture[str]):
    file = project.path / "model" / "tokenizer_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"chat_template": [{"name": "rag", "template": "x"}]}))
    assert check(project, capsys) == (
        "The tokenizer in model has the chat templates rag, none of them called default: add chat_template.jinja to "
        "its directory."
    )


def test_a_bar_is_shown_where_there_are_many(
    project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(conversations, "SHOWN_ABOVE", 10)
    assert main([str(project.yaml), "--check", "task.options.train_size=50"]) == 0
    assert "Reading 114 problems as the model will, once\n" in capsys.readouterr().out
