import subprocess
import sys
from pathlib import Path

import pytest

from tests.synthetic_run import synthetic_run

ROOT = Path(__file__).parents[2]


def shown(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/show_rollouts.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("rollouts") / "x"
    synthetic_run(
        path, lambda step: [[f"[red]s{step} p{p} r{g}[/]\x1b[2J" for g in range(2)] for p in range(2)]
    )
    return str(path)


def test_the_steps(run: str):
    done = shown(run)
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("│")]
    assert [row[1:6:2] for row in rows] == [[str(step), "4", "2"] for step in range(3)]


def test_the_responses_of_a_step_and_a_problem_without_what_steers_a_terminal(run: str):
    done = shown(run, "--step", "1")
    assert [line.split()[3] for line in done.stdout.splitlines() if line.startswith("step")] == list("0123")
    assert "[red]s1 p1 r0[/]\\x1b[2J" in done.stdout and "\x1b" not in done.stdout
    assert "teacher read  <|im_start|>user" in done.stdout and "solution  response 0" in done.stdout
    failed = shown(run, "--step", "1", "--failed")
    assert [line.split()[3:5] for line in failed.stdout.splitlines() if line.startswith("step")] == [
        ["1", "wrong"],
        ["3", "wrong"],
    ]
    problem = shown(run, "--problem", "p1", "--limit", "3")
    assert [line.split()[1] for line in problem.stdout.splitlines() if line.startswith("step")] == [
        "0",
        "0",
        "1",
    ]
    assert problem.stdout.splitlines()[-1] == "There are more than 3: --limit 0 shows all."


def test_what_is_not_there_is_one_line(run: str, tmp_path: Path):
    for arguments, line in (
        (
            [str(tmp_path / "x")],
            f"{tmp_path / 'x'} does not exist; name a run directory, such as runs/demo_cpu.",
        ),
        ([run, "--problem", "no"], "No response is of this kind; leave out --problem or --failed."),
        (
            [run, "--split", "no"],
            f"{run}/rollouts/no holds no records: log.rollouts was false, no step has ended, or --split is wrong.",
        ),
        (
            [run, "--step", "9"],
            f"{run}/rollouts/train/000009.jsonl does not exist; name the .jsonl file of a step whose responses were "
            "recorded.",
        ),
    ):
        done = shown(*arguments)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {line}\n")
