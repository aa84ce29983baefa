"""What only the job can see: nodes without the run directory, and files that changed while it waited. It ends at once,
says what to do, and does not come back."""

import subprocess
from pathlib import Path

import pytest

import yaml
from sdpo_megatron.job.description import JobDirectory, read_attempts
from sdpo_megatron.job.state import number_of
from slurm import status, submit
from tests.e2e.running import tiny_settings
from tests.slurm.cluster import Cluster
from tests.stand_in_server import stand_in_python
from tests.tiny_model import make_tiny_model

HARDWARE = {
    "hardware": {
        **{"nodes": 3, "cpus_per_node": 4, "placement": "separate_nodes", "server_nodes": 1},
        "sbatch_args": {"hold": True, "nodelist": "n[1-3]"},
    }
}


@pytest.fixture
def held(cluster: Cluster, shared_dir: Path) -> Path:
    """The run directory of a job that waits to be released."""
    model, python = make_tiny_model(shared_dir / "model"), stand_in_python(shared_dir / "stand_in")
    settings = tiny_settings(model, python, shared_dir, parallel={"micro_batch_tokens": 512, "dp": 2})
    for name, values in {"tiny.yaml": settings, "hardware.yaml": HARDWARE}.items():
        (shared_dir / name).write_text(yaml.safe_dump(values))
    assert submit.main([str(shared_dir / "tiny.yaml"), str(shared_dir / "hardware.yaml")]) == 0
    return shared_dir / "runs" / "tiny"


def ended(cluster: Cluster, run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Why it ended, after one attempt."""
    job = number_of(run)
    cluster.run("scontrol", "release", job)
    assert cluster.wait_for_state(job, "FAILED", "COMPLETED", seconds=120)["ExitCode"] == "2:0"
    (attempt,) = read_attempts(JobDirectory(run / "job"))
    capsys.readouterr()
    assert status.main([str(run)]) == 0
    assert f"tiny, job {job}: failed\n" in (shown := capsys.readouterr().out) and attempt.reason in shown
    return attempt.reason


def test_nodes_that_do_not_see_the_run_directory(
    cluster: Cluster, held: Path, capsys: pytest.CaptureFixture[str]
):
    # as where run.dir is a directory of each machine's own
    firsts = [str(cluster.processes(node)[0].pid) for node in ("n2", "n3")]
    enter = ["nsenter", "--mount", "--target"]
    try:
        for first in firsts:
            subprocess.run([*enter, first, "mount", "-t", "tmpfs", "none", str(held)], check=True)
        reason = ended(cluster, held, capsys)
    finally:
        for first in firsts:
            subprocess.run([*enter, first, "umount", str(held)], check=True)
    assert reason == f"n2, n3 do not see {held}, which must lie where all nodes see it: set run.dir."


def test_a_file_that_changed_while_the_job_waited(
    cluster: Cluster, held: Path, shared_dir: Path, capsys: pytest.CaptureFixture[str]
):
    config = shared_dir / "model" / "config.json"
    config.write_text(config.read_text() + "\n")
    assert ended(cluster, held, capsys) == (
        f"{config} has changed since the run was submitted: submit the run again, or put the earlier file back."
    )
