"""A plain job of slurm/train.sbatch that cannot be; test_jobs.py has one that runs."""

import subprocess
from pathlib import Path

from tests.slurm.cluster import REPOSITORY, Cluster
from tests.slurm.plain import make_clone, sbatch


def test_a_job_of_another_size_ends_at_once(cluster: Cluster, shared_dir: Path):
    job = sbatch(cluster, make_clone(shared_dir), nodes=1)
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
