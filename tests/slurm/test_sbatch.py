"""A run as a plain job of slurm/train.sbatch: prepared in the job, told of its end, and back again."""

import subprocess
from pathlib import Path

import pytest

import yaml
from sdpo_megatron.job.description import JobDirectory, read_attempts
from sdpo_megatron.job.state import number_of
from sdpo_megatron.run_dir.metrics_file import read_rows
from sdpo_megatron.run_dir.phases import read_phase
from tests.e2e.running import tiny_settings
from tests.slurm.cluster import REPOSITORY, Cluster
from tests.stand_in_server import stand_in_python
from tests.tiny_model import make_tiny_model

HARDWARE = {"hardware": {"nodes": 2, "cpus_per_node": 4, "placement": "separate_nodes", "server_nodes": 1}}


@pytest.fixture
def clone(cluster: Cluster, shared_dir: Path) -> Path:
    """A directory like the repository, with an experiment, that a job may write into."""
    clone = shared_dir / "clone"
    clone.mkdir()
    for name in ("slurm", "sdpo_megatron", ".venv"):
        (clone / name).symlink_to(REPOSITORY / name)
    model, python = make_tiny_model(shared_dir / "model"), stand_in_python(shared_dir / "stand_in")
    settings = tiny_settings(model, python, shared_dir, run={"steps": 8}, checkpoint={"every": 100})
    (clone / "tiny.yaml").write_text(yaml.safe_dump(settings))
    (clone / "hardware.yaml").write_text(yaml.safe_dump(HARDWARE))
    return clone


def sbatch(cluster: Cluster, clone: Path, nodes: int) -> int:
    options = [
        "--parsable",
        f"--nodes={nodes}",
        "--cpus-per-task=4",
        "--mem=6000",
        "--partition=main",
        "--time=20",
    ]
    options.append(f"--output={cluster.shared}/%j.out")
    command = ["sbatch", *options, "slurm/train.sbatch", "tiny.yaml", "hardware.yaml", "run.seed=1"]
    return int(cluster.run(*command, cwd=clone))


def test_a_plain_job_that_is_preempted_comes_back_and_completes(
    cluster: Cluster, clone: Path, shared_dir: Path
):
    job, run = sbatch(cluster, clone, nodes=2), shared_dir / "runs" / "tiny"

    def learns() -> bool:
        now = read_phase(run / "phases" / "rank_0.json")
        return now is not None and now.step is not None and now.step >= 2

    cluster.wait_for(learns, f"it learns: {cluster.output(job)}", 240)
    assert number_of(run) == str(job) and (clone / f"slurm-{job}.run").read_text() == f"{run}\n"
    # what is changed now is not this job's
    (clone / "tiny.yaml").unlink()
    other = cluster.submit("sleep 1", "--partition=high", "--nodes=4", "--exclusive")
    cluster.wait_for_state(other, "COMPLETED", seconds=240)
    cluster.wait_for_state(job, "COMPLETED", seconds=400)
    attempts = read_attempts(JobDirectory(run / "job"))
    assert [attempt.why for attempt in attempts] == ["preempted", "finished"], cluster.output(job)
    assert [int(row["step"]) for row in read_rows(run / "metrics.jsonl")] == list(range(9))
    assert f"with the package in {run}/job/code. Logs: " in cluster.output(job)


def test_a_job_of_another_size_ends_at_once(cluster: Cluster, clone: Path, shared_dir: Path):
    job = sbatch(cluster, clone, nodes=1)
    assert cluster.wait_for_state(job, "FAILED", "COMPLETED", seconds=120)["ExitCode"] == "2:0"
    assert cluster.output(job) == (
        "error: This job has 1 node, and hardware.nodes is 2: give sbatch --nodes=2, or set hardware.nodes=1.\n"
    )
    assert not (shared_dir / "runs").exists()


def test_outside_of_the_clone(cluster: Cluster, shared_dir: Path):
    script = (REPOSITORY / "slurm" / "train.sbatch").read_text()
    environment = cluster.environment | {"SLURM_SUBMIT_DIR": str(shared_dir), "SLURM_JOB_ID": "1"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        2,
        f"error: {shared_dir} has no slurm/submit.py: call sbatch in the root of the clone\n",
    )
