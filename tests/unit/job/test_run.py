"""What becomes of a job behind an attempt, which its scheduler is asked for."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sdpo_megatron.cluster.hardware import HardwareSettings
from sdpo_megatron.errors import EXIT_FAILED
from sdpo_megatron.job.attempt import Signals
from sdpo_megatron.job.description import Job, JobDirectory, ask_to_stop, read_attempts, write_job
from sdpo_megatron.job.requeue import Attempt
from sdpo_megatron.job.run import follow, run_attempt
from sdpo_megatron.job.state import write_number


@dataclass
class Asked:
    cancelled: bool
    came_back: bool = False

    def is_cancelled(self) -> bool:
        return self.cancelled

    def come_back(self) -> int:
        self.came_back = True
        return 0


@pytest.mark.parametrize("cancelled", [None, "by Slurm's command", "by ours"])
@pytest.mark.parametrize("why", ["preempted", "failed", "finished"])
def test_what_was_cancelled_while_it_ended_does_not_come_back(
    tmp_path: Path, why: Any, cancelled: str | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Signals, "comes_within", lambda signals, seconds: None)
    directory, scheduler = JobDirectory(tmp_path / "job"), Asked(cancelled == "by Slurm's command")
    directory.path.mkdir()
    write_number(directory, "12_3")
    # a job of this run before
    ask_to_stop(directory, "12_3" if cancelled == "by ours" else "7_3")
    job = Job(name="x", hardware=HardwareSettings(), arguments=(), python=sys.executable)
    ended = Attempt(why=why, steps=4, reason="rank 1 was ended by SIGKILL" if why == "failed" else "")
    code = follow(directory, job, scheduler, Signals(), [ended])  # type: ignore[arg-type]
    comes_back = why != "finished" and not cancelled
    assert scheduler.came_back == comes_back and (code == 0) == (comes_back or why == "finished")
    (noted,) = read_attempts(directory)
    assert noted.why == ("asked" if cancelled and why != "finished" else why) and noted.steps == 4


def test_what_is_stopped_in_the_pause_behind_a_failure_has_been_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Signals, "comes_within", lambda signals, seconds: "asked")
    directory, scheduler = JobDirectory(tmp_path / "job"), Asked(cancelled=False)
    directory.path.mkdir()
    write_number(directory, "12")
    job = Job(name="x", hardware=HardwareSettings(), arguments=(), python=sys.executable)
    ended = [Attempt(why="preempted", steps=2), Attempt(why="failed", steps=4, reason="full")]
    assert follow(directory, job, scheduler, Signals(), ended) == EXIT_FAILED  # type: ignore[arg-type]
    assert not scheduler.came_back
    assert [(noted.why, noted.steps) for noted in read_attempts(directory)] == [
        ("preempted", 2),
        ("asked", 4),
    ]


def test_an_attempt_that_slurm_starts_behind_a_stop_is_none(tmp_path: Path):
    directory = JobDirectory(tmp_path / "job")
    write_job(directory, Job(name="x", hardware=HardwareSettings(), arguments=(), python=sys.executable))
    write_number(directory, "12")
    ask_to_stop(directory, "12")
    assert run_attempt(tmp_path, Asked(cancelled=False)) == EXIT_FAILED  # type: ignore[arg-type]
    assert read_attempts(directory) == [] and not directory.begun.exists()
