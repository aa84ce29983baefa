"""Slurm's commands by stand-ins on a PATH of their own."""

from pathlib import Path

import pytest

from sdpo_megatron.doctor import slurm_commands as module
from sdpo_megatron.doctor.slurm_commands import COMMANDS, slurm_commands


@pytest.fixture
def path(tmp_path: Path):
    def make(
        *commands: str, scontrol: str = "echo 'Slurmctld(primary) at head is UP'; echo"
    ) -> dict[str, str]:
        for command in commands:
            file = tmp_path / command
            file.write_text(f"#!/bin/sh\n{scontrol if command == 'scontrol' else ''}\n")
            file.chmod(0o755)
        return {"PATH": str(tmp_path)}

    return make


def test_none_is_fine(path):
    (finding,) = slurm_commands(path())
    assert (finding.status, finding.found) == ("ok", "not here: fine without Slurm")


def test_all_and_the_controller(path):
    (finding,) = slurm_commands(path(*COMMANDS))
    assert finding.status == "ok"
    assert finding.found == "sbatch, srun, sinfo, scontrol on PATH; Slurmctld(primary) at head is UP"


def test_some_are_missing(path):
    (finding,) = slurm_commands(path("sbatch", "scontrol"))
    assert (finding.status, finding.found) == ("warning", "sbatch, scontrol on PATH, but not srun, sinfo")


def test_a_job_needs_scontrol_on_its_node(path):
    environment = path("srun") | {"SLURM_JOB_ID": "17"}
    (finding,) = slurm_commands(environment)
    assert (finding.status, finding.found) == ("failure", "this is job 17, but scontrol is not on PATH")
    assert "requeues itself" in finding.todo


@pytest.mark.parametrize(
    ("script", "limit_s", "why"),
    [
        ("echo 'slurm_load_ctl_conf error: Unable to contact' >&2; exit 1", 30.0, "Unable to contact"),
        ("exec /bin/sleep 600", 0.5, "no answer within 0.5 s"),
    ],
)
def test_a_controller_that_does_not_answer(script, limit_s, why, path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "ASK_LIMIT_S", limit_s)
    (finding,) = slurm_commands(path(*COMMANDS, scontrol=script))
    assert finding.status == "warning"
    assert finding.found.startswith("the controller does not answer: ") and finding.found.endswith(why)
