"""What Slurm says, as a job reads it."""

import os
from pathlib import Path

import pytest

from sdpo_megatron.job.slurm import SlurmJob, steps_of


@pytest.mark.parametrize(
    ("restarts", "said", "is_cancelled"),
    [
        (None, "JobState=COMPLETING Reason=None Requeue=1 Restarts=0", True),
        ("2", "JobState=COMPLETING Reason=None Requeue=1 Restarts=2", True),
        ("2", "JobState=CANCELLED Reason=None Requeue=1 Restarts=2", True),
        ("2", "JobState=RUNNING Reason=None Requeue=1 Restarts=2", False),
        # it comes back by itself, as after a preemption
        ("2", "JobState=COMPLETING Reason=None Requeue=1 Restarts=3", False),
        ("2", "JobState=COMPLETING Reason=TimeLimit Requeue=1 Restarts=2", False),
        ("2", "", False),
    ],
)
def test_whether_somebody_has_cancelled_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restarts: str | None, said: str, is_cancelled: bool
):
    (tmp_path / "said").write_text(f"JobId=7 {said}\n" if said else "")
    program = tmp_path / "scontrol"
    program.write_text(
        f'#!/bin/sh\n[ "$2" = hostnames ] && exec echo n1\n[ -s {tmp_path}/said ] && exec cat {tmp_path}/said\nexit 1\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    environment = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}
    environment |= {} if restarts is None else {"SLURM_RESTART_COUNT": restarts}
    assert SlurmJob(environment).is_cancelled() == is_cancelled


def test_a_partition_that_the_site_hides_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without --all squeue shows none of its steps, and scontrol does not find it."""
    for name, answer in {
        "squeue": "echo '7.0|trainer'; echo '7.batch|batch'",
        "scontrol": "echo 'PartitionName=own PreemptMode=REQUEUE GraceTime=30'",
    }.items():
        (tmp_path / name).write_text(
            f'#!/bin/sh\n[ "$2" = hostnames ] && exec echo n1\n'
            f'for option; do [ "$option" = --all ] && {{ {answer}; exit 0; }}; done; exit 0\n'
        )
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert steps_of("7") == {"7.0": "trainer"}
    job = SlurmJob({"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_PARTITION": "own"})
    assert job.preemption_grace_s() == 30
