"""What Slurm says, as a job reads it."""

import os
from pathlib import Path

import pytest

from sdpo_megatron.job.slurm import SlurmJob


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
