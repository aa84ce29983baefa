"""A job in its run directory."""

from pathlib import Path

import pytest

from sdpo_megatron.cluster.hardware import HardwareSettings
from sdpo_megatron.errors import UserError
from sdpo_megatron.job.description import (
    SILENT,
    Job,
    JobDirectory,
    begin_attempt,
    read_attempts,
    read_job,
    write_attempts,
    write_job,
)
from sdpo_megatron.job.requeue import Attempt

JOB = Job(
    name="x",
    hardware=HardwareSettings(nodes=2, setup=["module load cuda"]),
    arguments=("/a.yaml", "run.steps=3"),
    python="/venv/bin/python",
)


def test_a_job_is_read_as_it_was_written(tmp_path: Path):
    directory = JobDirectory(tmp_path / "job")
    write_job(directory, JOB)
    assert read_job(directory) == JOB


def test_attempts_are_read_up_to_what_a_crash_cut_short(tmp_path: Path):
    directory = JobDirectory(tmp_path)
    assert read_attempts(directory) == []
    attempts = [Attempt(why="preempted", steps=3), Attempt(why="failed", steps=4, exit_code=1, reason="odd")]
    write_attempts(directory, attempts)
    assert read_attempts(directory) == attempts
    with directory.attempts.open("a") as file:
        file.write('{"why": "fai')
    assert read_attempts(directory) == attempts


def test_an_attempt_that_has_not_said_how_it_ended_failed(tmp_path: Path):
    directory = JobDirectory(tmp_path)
    assert begin_attempt(directory, 0) == []
    ended = Attempt(why="preempted", steps=3)
    write_attempts(directory, [ended])
    assert begin_attempt(directory, 3) == [ended]
    # its node was lost
    lost = Attempt(why="failed", steps=5, exit_code=1, reason=SILENT)
    assert begin_attempt(directory, 5) == [ended, lost] == read_attempts(directory)
    assert begin_attempt(directory, 5) == [ended, lost, lost]


@pytest.mark.parametrize(
    "text", [None, "{", "[]", '{"name": "x"}', '{"name": "x", "hardware": {"nodez": 1}}']
)
def test_no_job_or_a_damaged_one_is_one_line(tmp_path: Path, text: str | None):
    directory = JobDirectory(tmp_path)
    if text is not None:
        directory.description.write_text(text)
    with pytest.raises(UserError) as raised:
        read_job(directory)
    assert str(directory.description) in str(raised.value) and "submit" in str(raised.value)
