"""The environment of programs: from an answer to a grade, and which tests judge which question."""

import json
import time

import psutil
import pytest

from sdpo_megatron.config import GradingSettings, TaskSettings
from sdpo_megatron.envs import build_environment
from sdpo_megatron.envs.grading import pool
from sdpo_megatron.envs.python_tests import PythonTests, PythonTestsOptions
from sdpo_megatron.envs.sandbox.base import SandboxFault
from sdpo_megatron.errors import GradingFault, UserError
from sdpo_megatron.records import FinishReason, Grade
from sdpo_megatron.strict_yaml.load import parse
from tests.graders import answering

RIGHT = "```python\nprint(sum(map(int, input().split())))\n```"


@pytest.fixture
def made(tmp_path):
    """An environment of so many questions, each with one public test and ten private ones."""

    def made(questions: int = 1, **options) -> PythonTests:
        tests = [{"input": "1 2", "output": "3", "public": True}]
        tests += [{"input": f"{n} 10", "output": f"{n + 10}"} for n in range(10)]
        file = tmp_path / "questions.jsonl"
        file.write_text(
            "".join(
                json.dumps({"id": f"q{n}", "prompt": "Add.", "tests": tests}) + "\n" for n in range(questions)
            )
        )
        values = {"train_file": str(file), "format": "own", "test_questions": 0, **options}
        return PythonTests(
            parse(PythonTests.Options, {k: v for k, v in values.items() if v is not None}, {}, "x")
        )

    return made


def test_the_reward_is_1_for_all_tests_and_0_else(made):
    env = made()
    [problem] = env.train_problems()
    grade = env.grade(problem, answering(f"I add them.\n{RIGHT}"))
    assert (grade.reward, grade.feedback, grade.metrics) == (1.0, "", {"tests_passed": 1.0})
    grade = env.grade(
        problem, answering("```python\na, b = input().split()\nprint(3 if a == '1' else 13)\n```")
    )
    assert (grade.reward, grade.correct_format) == (0.0, True)
    assert grade.metrics == {"tests_passed": 2 / 11}
    assert grade.feedback == "Wrong Answer\n\nThe test is not shown."
    grade = env.grade(problem, answering("```python\nprint(4)\n```"))
    assert grade.feedback == "Wrong Answer\n\nInput:\n1 2\nOutput:\n4\nExpected:\n3"


def test_private_tests_are_shown_by_an_option(made):
    env = made(show_private_tests=True)
    grade = env.grade(env.train_problems()[0], answering("```python\nprint(3)\n```"))
    assert "Input:\n0 10\nOutput:\n3\nExpected:\n10" in grade.feedback


def test_no_program_and_half_a_program(made):
    env = made()
    [problem] = env.train_problems()
    answers: list[tuple[str, FinishReason, str]] = [
        ("The answer is 3.", "stop", "holds no complete program"),
        ("```python\nprint(", "length", "cut off at its greatest length"),
    ]
    for text, reason, words in answers:
        grade = env.grade(problem, answering(text, reason))
        assert (grade.reward, grade.correct_format) == (0.0, False) and words in grade.feedback
        assert grade.metrics == {"tests_passed": 0.0}
    # cut off behind a whole program: that one counts
    assert env.grade(problem, answering(f"{RIGHT}\nThis progr", "length")).reward == 1.0


def test_a_fault_of_the_sandbox_is_no_grade(made, monkeypatch):
    env = made()

    def broken(program, limits):
        raise SandboxFault("no more processes")

    monkeypatch.setattr(env._sandbox, "run", broken)
    with pytest.raises(GradingFault, match="no more processes"):
        env.grade(env.train_problems()[0], answering(RIGHT))


def test_held_out_questions_are_others(made):
    env = made(20, test_questions=None)
    train, test = [
        {problem.id for problem in problems} for problems in (env.train_problems(), env.test_problems())
    ]
    assert len(train) == 18 and len(test) == 2 and not train & test
    assert {p.id for p in made(20, test_questions=None).test_problems()} == test
    assert {p.id for p in made(20, test_questions=None, seed=1).test_problems()} != test
    assert env.grade(env.test_problems()[0], answering(RIGHT)).metrics == {"tests_passed": 1.0}


def test_the_papers_split_trains_on_half_of_the_private_tests_of_the_same_questions(made):
    env = made(2, split="paper", test_questions=None)
    assert [problem.id for problem in env.train_problems()] == [problem.id for problem in env.test_problems()]
    train, test = env._tests["train"]["q0"].cases, env._tests["test"]["q0"].cases
    assert len(train) == 5 and len(test) == 11 and all(case.public for case in train)
    assert {case.input for case in train} < {case.input for case in test}
    assert [case.input for case in train] != [case.input for case in env._tests["train"]["q1"].cases]
    # a program that knows what it was shown is right in training and wrong in evaluation
    known = {case.input: case.expected for case in train}
    program = answering(f"```python\nprint({known!r}.get(input()))\n```")
    assert env.grade(env.train_problems()[0], program).reward == 1.0
    grade = env.grade(env.test_problems()[0], program)
    assert grade.reward == 0.0 and grade.metrics == {"tests_passed": 5 / 11}


def test_public_tests_come_first_and_so_many_in_all(made):
    env = made(max_tests=3)
    cases = env._tests["train"]["q0"].cases
    assert [case.input for case in cases] == ["1 2", "0 10", "1 10"]
    assert env.grade_limit_s == 7 * 3 + 5 + 120


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "codeforces"}, "x.format is 'codeforces'.*must be 'livecodebench', "),
        ({"split": "paper", "test_file": "x"}, "test_file has the held-out questions"),
        ({"test_questions": 1}, "keeps 1 of 1 questions"),
        ({"train_file": "/not/there"}, "There is no problem file /not/there"),
        ({"sandbox": {"backend": "docker"}}, "x.sandbox.backend is 'docker'"),
        ({"sandbox": {"backend": "http", "url": "http://127.0.0.1:9"}}, "No sandbox.*127.0.0.1:9.*refused"),
        ({"max_tests": 0}, "must be greater than 0"),
    ],
)
def test_options_that_are_impossible(made, options, message):
    with pytest.raises(UserError, match=message):
        made(**options)


def test_an_id_twice_and_an_empty_file(made, tmp_path):
    twice = tmp_path / "twice.jsonl"
    row = json.dumps({"id": "a", "prompt": "x", "tests": [{"input": "", "output": ""}]})
    twice.write_text(f"{row}\n{row}\n")
    with pytest.raises(UserError, match="twice.jsonl line 2: id 'a' is that of .*line 1 too"):
        made(train_file=str(twice))
    twice.write_text("\n")
    with pytest.raises(UserError, match="holds no problem"):
        made(train_file=str(twice))


def test_a_sandbox_that_is_killed_in_mid_grade_costs_nothing(made, tmp_path, monkeypatch, capfd):
    """In the processes that grade; one of them is killed together with its sandbox, too."""
    monkeypatch.setattr(pool, "PAUSE_S", 0.01)
    env = made(max_tests=1)
    options = {
        "train_file": str(tmp_path / "questions.jsonl"),
        "format": "own",
        "test_questions": 0,
        "max_tests": 1,
    }
    graders = pool.GradingPool(TaskSettings(env="python_tests", options=options), env, GradingSettings())
    graders.start()
    [problem] = env.train_problems()
    assert graders.submit(problem, answering(RIGHT)).result(60) == Grade(
        reward=1.0, metrics={"tests_passed": 1.0}
    )
    slow = answering("```python\nimport time\ntime.sleep(1.5)\nprint(sum(map(int, input().split())))\n```")
    for kill_parent in (False, True):
        future = graders.submit(problem, slow)
        deadline = time.monotonic() + 20
        found: list[tuple[psutil.Process, psutil.Process]] = []
        while not found and time.monotonic() < deadline:
            below = [(process, process.parent()) for process in psutil.Process().children(recursive=True)]
            found = [
                (process, parent)
                for process, parent in below
                if process.name() == "bwrap" and parent is not None and parent.name() != "bwrap"
            ]
        time.sleep(0.5)
        [(sandbox, grader)] = found
        inside = sandbox.children(recursive=True)
        (grader if kill_parent else sandbox).kill()
        grade = future.result(60)
        assert isinstance(grade, Grade) and grade.reward == 1.0
        assert not psutil.wait_procs(inside, timeout=10)[1]
    assert "Sandbox: bubblewrap, with /" in capfd.readouterr().out


def test_it_is_found_by_its_name(made, tmp_path):
    made()
    options = {"train_file": str(tmp_path / "questions.jsonl"), "format": "own", "test_questions": 0}
    env = build_environment(TaskSettings(env="python_tests", options=options))
    assert isinstance(env, PythonTests) and env.most_at_once and isinstance(env.options, PythonTestsOptions)
