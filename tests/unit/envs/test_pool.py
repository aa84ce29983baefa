"""Graders that hang, raise, die or have no infrastructure: real processes, and what becomes of their responses."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from sdpo_megatron.config import GradingSettings, TaskSettings
from sdpo_megatron.envs import build_environment
from sdpo_megatron.envs.grading import pool as pool_module
from sdpo_megatron.envs.grading.pool import GradingPool
from sdpo_megatron.launch.processes import wait_until
from sdpo_megatron.records import Grade, Message, Problem, Ungraded
from tests.graders import answering

FAILING, STRICT = "tests.graded_tasks:Failing", "tests.graded_tasks:Strict"


def pool_of(directory: Path, env: str = FAILING, **settings: Any) -> GradingPool:
    task = TaskSettings(env=env, options={"directory": str(directory)})
    return GradingPool(task, build_environment(task), GradingSettings(**settings))


def ask(pool: GradingPool, *texts: str) -> list[Grade | Ungraded]:
    """The i-th response is to problem `i`."""
    message = Message(role="user", content="?")
    futures: list[Future[Grade | Ungraded]] = [
        pool.submit(Problem(id=str(i), messages=[message]), answering(text)) for i, text in enumerate(texts)
    ]
    return [future.result(60) for future in futures]


def attempts(directory: Path, problem: int) -> int:
    return len(list(directory.glob(f"{problem} *")))


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_alive(pid)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(pool_module, "PAUSE_S", 0.01)


def test_graders_are_other_processes_that_were_warmed_up_once(tmp_path: Path):
    grades = ask(pool_of(tmp_path, num_workers=3), *["reward 0.25"] * 12)
    assert {grade.reward for grade in grades if isinstance(grade, Grade)} == {0.25}
    pids = {grade.metrics["pid"] for grade in grades if isinstance(grade, Grade)}
    warm = {grade.feedback for grade in grades if isinstance(grade, Grade)}
    assert 1 <= len(pids) <= 3 and os.getpid() not in pids
    (host,) = warm
    assert host.startswith("warm in ") and int(host.split()[-1]) not in {*pids, os.getpid()}


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("reward nan", "the environment gave the reward nan; rewards are numbers in [0, 1]"),
        ("reward 1.5", "the environment gave the reward 1.5; rewards are numbers in [0, 1]"),
        ("reward x", "the grader raised ValueError: could not convert string to float: 'x'"),
        ("none", "the environment returned NoneType and no Grade"),
        ("exit", "the grader raised SystemExit: from the grader"),
        ("unknown", "the grader raised AttributeError: "),
        ("unpicklable", "the environment gave a Grade whose feedback is"),
        ("typed feedback", "the environment gave a Grade whose feedback is 5 (int)"),
        ("typed correct_format", "the environment gave a Grade whose correct_format is None (NoneType)"),
        ("typed answer", "the environment gave a Grade whose answer is 5 (int)"),
        ("typed metrics", "the environment gave a Grade whose metrics is [1] (list)"),
        ("typed reward", "the environment gave a Grade whose reward is '1' (str)"),
    ],
)
def test_a_wrong_grader_leaves_the_response_out_at_once(tmp_path: Path, text: str, cause: str):
    pool = pool_of(tmp_path)
    (left,) = ask(pool, text)
    assert isinstance(left, Ungraded) and left.cause.startswith(cause) and left.rollout.text == text
    assert attempts(tmp_path, 0) == 1
    assert isinstance(ask(pool, "reward 1")[0], Grade)


def test_halves_of_characters_are_escaped_before_a_tokenizer_or_a_file_meets_them(tmp_path: Path):
    grade, left = ask(pool_of(tmp_path), "surrogate", "surrogate raised")
    assert isinstance(grade, Grade) and isinstance(left, Ungraded)
    assert (grade.feedback, grade.answer, dict(grade.metrics)) == (
        "half \\ud800",
        "\\udfff",
        {"\\ud800": 1.0},
    )
    assert left.cause.startswith("the grader raised ValueError: half \\ud800 (")


def test_a_graders_mistake_is_told_with_its_place(tmp_path: Path):
    (left,) = ask(pool_of(tmp_path), "reward x")
    assert isinstance(left, Ungraded) and re.search(r"graded_tasks\.py, line \d+\)$", left.cause)


def test_what_a_grader_left_running_ends_with_it(tmp_path: Path):
    script = RUN.replace('submit(pool, "wait 100", 2)', 'submit(pool, "leave", 1)')
    run = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    with run.stdout:
        run.stdout.readline()
        assert wait_until(
            lambda: (tmp_path / "child").exists() and bool((tmp_path / "child").read_text()), 60
        )
        child = int((tmp_path / "child").read_text())
        assert is_alive(child)
        run.terminate()
        run.wait()
    assert gone(child)


def test_a_problem_that_cannot_be_handed_over_stops_nothing(tmp_path: Path):
    problem = Problem(id="0", messages=[], metadata={"check": lambda text: True})
    left = pool_of(tmp_path).submit(problem, answering("reward 1")).result(60)
    assert isinstance(left, Ungraded) and left.cause.startswith("the problem cannot be handed to a grader, ")


def test_a_grader_that_hangs_is_killed_with_what_it_started_and_holds_nobody_up(tmp_path: Path):
    pool = pool_of(tmp_path, num_workers=2, limit_s=1.0)
    began = time.monotonic()
    left, *rest = ask(pool, "hang", *["reward 1"] * 20)
    assert time.monotonic() - began < 15
    assert isinstance(left, Ungraded)
    assert left.cause == "the grader was not done within 1 s (grading.limit_s)"
    assert all(isinstance(grade, Grade) for grade in rest)
    assert gone(int((tmp_path / "0 0").read_text())) and gone(int((tmp_path / "child").read_text()))
    assert attempts(tmp_path, 0) == 1


def test_only_an_environment_that_says_so_takes_slowness_for_a_fault_of_the_response(tmp_path: Path):
    assert ask(pool_of(tmp_path, STRICT, limit_s=0.5), "wait 9") == [Grade(reward=0.0, feedback="Too slow.")]


def test_a_fault_of_the_infrastructure_is_tried_again(tmp_path: Path, quick):
    graded, left = ask(pool_of(tmp_path), "fault 2", "fault 9")
    assert isinstance(graded, Grade) and graded.reward == 1.0
    assert isinstance(left, Ungraded) and left.cause == "no service, attempt 2"
    assert (attempts(tmp_path, 0), attempts(tmp_path, 1)) == (3, 3)


def test_a_grader_that_ends_is_replaced(tmp_path: Path, quick):
    graded, left = ask(pool_of(tmp_path), "end 1", "end 9")
    assert isinstance(graded, Grade) and attempts(tmp_path, 0) == 2
    assert isinstance(left, Ungraded) and left.cause == "the grader's process ended, or was killed"


def test_signal_alarm_works_in_a_grader(tmp_path: Path):
    (grade,) = ask(pool_of(tmp_path), "alarm")
    assert isinstance(grade, Grade)


def started(directory: Path, problems: int) -> list[int]:
    """Waits until so many problems are being graded; returns the graders' process ids."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        files = [directory / f"{p} 0" for p in range(problems)]
        if all(file.is_file() and file.read_text() for file in files):
            return [int(file.read_text()) for file in files]
        time.sleep(0.02)
    raise AssertionError("the graders do not start")


def submit(pool: GradingPool, text: str, number: int) -> list[Future[Grade | Ungraded]]:
    return [pool.submit(Problem(id=str(i), messages=[]), answering(text)) for i in range(number)]


def test_a_killed_grader_costs_only_a_second_try(tmp_path: Path, quick):
    pool = pool_of(tmp_path)
    futures = submit(pool, "wait 1.5", 3)
    for pid in started(tmp_path, 3)[:2]:
        os.kill(pid, signal.SIGKILL)
    assert [type(future.result(30)) for future in futures] == [Grade] * 3
    assert [attempts(tmp_path, p) for p in range(3)] == [2, 2, 1]


def test_a_killed_host_is_started_again(tmp_path: Path, quick):
    pool = pool_of(tmp_path)
    futures = submit(pool, "wait 1.5", 3)
    pids = started(tmp_path, 3)
    os.kill(pool._host._process.pid, signal.SIGKILL)
    assert [type(future.result(30)) for future in futures] == [Grade] * 3
    assert all(gone(pid) for pid in pids)


RUN = """
import sys, time
from pathlib import Path
from tests.unit.envs.test_pool import pool_of, submit

pool = pool_of(Path(sys.argv[1]))
pool.start()
submit(pool, "wait 100", 2)
print(pool._host._process.pid, flush=True)
time.sleep(100)
"""


def test_graders_end_with_the_run(tmp_path: Path):
    """A run that is killed closes nothing."""
    run = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    with run.stdout:
        pids = [int(run.stdout.readline()), *started(tmp_path, 2)]
        assert all(is_alive(pid) for pid in pids)
        run.kill()
        run.wait()
    assert all(gone(pid) for pid in pids)


def test_a_stop_reaches_the_run_and_not_its_graders(tmp_path: Path):
    pool = pool_of(tmp_path)
    futures = submit(pool, "wait 1", 2)
    for pid in [*started(tmp_path, 2), pool._host._process.pid]:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(pid, number)
    assert [type(future.result(30)) for future in futures] == [Grade] * 2
    assert [attempts(tmp_path, p) for p in range(2)] == [1, 1]


def test_an_environment_that_cannot_be_built_again_is_told(tmp_path: Path, quick):
    task = TaskSettings(env=FAILING, options={"directory": str(tmp_path), "broken": True})
    env = build_environment(TaskSettings(env=FAILING, options={"directory": str(tmp_path)}))
    (left,) = ask(GradingPool(task, env, GradingSettings()), "reward 1")
    assert isinstance(left, Ungraded)
    assert "could not build the environment: ConfigError: task.env=tests.graded_tasks:Failing" in left.cause
    assert "RuntimeError: of building it" in left.cause


@pytest.mark.parametrize(("env", "at_once"), [(FAILING, 3), (STRICT, 2)])
def test_no_more_are_graded_at_a_time(tmp_path: Path, env: str, at_once: int):
    pool = pool_of(tmp_path, env, num_workers=3)
    futures = submit(pool, "wait 0.5", 6)
    time.sleep(0.1)
    assert len(pool._threads._threads) == at_once
    graders = set()
    for future in futures:
        future.result(30)
    for file in tmp_path.glob("* 0"):
        graders.add(file.read_text())
    assert len(graders) == at_once


def test_2048_graders_that_wait_take_a_tenth_of_one_after_another(tmp_path: Path):
    """Scaled: 128 graders of 0.5 s."""
    pool = pool_of(tmp_path)
    ask(pool, *["reward 1"] * 16)
    began = time.monotonic()
    for future in submit(pool, "wait 0.5", 128):
        future.result(60)
    assert time.monotonic() - began < 128 * 0.5 / 10
