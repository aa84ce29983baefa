"""What is said of a job, and how it is stopped; a stand-in takes the place of Slurm's commands."""

import json
import os
import stat
from pathlib import Path

import pytest

from sdpo_megatron.job.description import JobDirectory, is_asked_to_stop, write_attempts
from sdpo_megatron.job.requeue import Attempt
from sdpo_megatron.job.state import write_number
from slurm import status, stop


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    run = tmp_path / "runs" / "x"
    (run / "job").mkdir(parents=True)
    write_number(JobDirectory(run / "job"), "4711")
    (run / "config.json").write_text(json.dumps({"values": {"run": {"steps": 20}}}))
    rows = [{"step": k, "time/total": 30.0, "env/all/reward/total": 0.25 * k} for k in range(3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    program(tmp_path, "scancel", f'echo "$@" >> {tmp_path}/cancelled')
    return run


def program(directory: Path, name: str, script: str) -> None:
    path = directory / "bin" / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(stat.S_IRWXU)


def queue(directory: Path, line: str) -> None:
    program(directory, "squeue", f"echo '{line}'")


def test_a_run_that_works(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    queue(tmp_path, "RUNNING|None|1:02:03|n[1-3]")
    write_attempts(JobDirectory(run / "job"), [Attempt(why="preempted", steps=2, exit_code=143)])
    assert status.main([str(run)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "x, job 4711: running on n[1-3], 1:02:03 left of its time",
        "    step 2 of 20, 30 s a step",
        "    reward 0.5",
        "    attempt 0: preempted after 2 steps",
    ]


def test_a_run_that_hangs(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    queue(tmp_path, "RUNNING|None|1:02:03|n[1-3]")
    (run / "logs" / "attempt_000").mkdir(parents=True)
    diagnosis = run / "logs" / "diagnosis.txt"
    diagnosis.write_text("12:00:00 rank 1 (on n2) does not say what it is at\n\nrank 1, on n2: ...\n")
    said = f"    at 12:00:00 rank 1 (on n2) does not say what it is at ({diagnosis})\n"
    assert status.main([str(run)]) == 0 and said in capsys.readouterr().out
    # that of an earlier attempt
    os.utime(diagnosis, (0, 0))
    assert status.main([str(run)]) == 0 and said not in capsys.readouterr().out


def test_a_run_that_waits(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    queue(tmp_path, "PENDING|Priority|1-00:00:00|")
    (run / "metrics.jsonl").unlink()
    assert status.main([str(run)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "x, job 4711: waits (Priority)",
        "    no step of 20 yet",
    ]


@pytest.mark.parametrize(
    "ended", ["echo -n", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"]
)
def test_a_run_that_failed_shows_the_end_of_its_log(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ended: str
):
    program(tmp_path, "squeue", ended)
    attempts = [Attempt(why="failed", steps=2, exit_code=1, reason="The loss is nan.")] * 3
    write_attempts(JobDirectory(run / "job"), attempts)
    logs = run / "logs" / "attempt_002"
    logs.mkdir(parents=True)
    (logs / "rank0.log").write_text("".join(f"line {k}\n" for k in range(30)))
    assert status.main([str(run)]) == 0
    out = capsys.readouterr().out
    assert (
        "x, job 4711: failed\n" in out and "    attempt 2: failed after 2 steps (The loss is nan.)\n" in out
    )
    assert out.endswith("        line 28\n        line 29\n") and "line 19\n" not in out


@pytest.mark.parametrize(
    ("line", "cancelled", "told"),
    [
        ("RUNNING|None|1:02:03|n1", "--batch --signal=TERM 4711\n", "saves and ends"),
        ("PENDING|Priority|1:00:00|", "4711\n", "was waiting, and is cancelled"),
        ("", "", "has ended already"),
    ],
)
def test_stopping(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, cancelled: str, told: str
):
    program(tmp_path, "squeue", f"echo -n '{line}'")
    (tmp_path / "cancelled").touch()
    assert stop.main([str(run)]) == 0
    assert told in capsys.readouterr().out and (tmp_path / "cancelled").read_text() == cancelled
    assert is_asked_to_stop(JobDirectory(run / "job")) == ("signal" in cancelled)


@pytest.mark.parametrize("command", [status, stop])
def test_what_was_not_submitted(command, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert command.main([str(tmp_path)]) == 2
    assert "was not submitted by slurm/submit.py" in capsys.readouterr().err
    assert command.main([]) == 2
    assert "name the run director" in capsys.readouterr().err


@pytest.mark.parametrize("command", [status, stop])
def test_a_controller_that_does_not_answer(
    command, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    program(tmp_path, "squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    assert command.main([str(run)]) == 1
    errors = capsys.readouterr().err
    assert "Unable to contact slurm controller" in errors and errors.count("\n") == 1


def test_a_run_of_which_all_was_killed(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    program(tmp_path, "squeue", "true")
    directory = JobDirectory(run / "job")
    write_attempts(directory, [Attempt(why="asked", steps=2, exit_code=143)])
    directory.begun.write_text("2\n")
    assert status.main([str(run)]) == 0
    assert "x, job 4711: ended without a word, as where all of it was killed: submit it again\n" in (
        capsys.readouterr().out
    )


def test_what_submitit_keeps_of_an_array_is_passed_over(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    program(tmp_path, "squeue", "true")
    sweep = run.parent / "a.sweep"
    sweep.mkdir()
    assert status.main([str(sweep), str(run)]) == 0 and "x, job 4711: " in capsys.readouterr().out


def test_a_job_that_ends_while_it_is_stopped(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    queue(tmp_path, "COMPLETING|None|INVALID|n1")
    program(
        tmp_path, "scancel", "echo 'scancel: error: Kill job error: Invalid job id specified' >&2; exit 1"
    )
    assert stop.main([str(run)]) == 0
    assert f"Job 4711 of {run} has ended already; " in capsys.readouterr().out
    (run / "metrics.jsonl").unlink()
    (run / "config.json").unlink()
    assert status.main([str(run)]) == 0
    assert capsys.readouterr().out == "x, job 4711: completing on n1\n    has not begun to train\n"


@pytest.mark.parametrize("command", [status, stop])
def test_how_it_is_called(command, capsys: pytest.CaptureFixture[str]):
    assert command.main(["--help"]) == 0 and " RUN_DIRECTORY" in capsys.readouterr().out
