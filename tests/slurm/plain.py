"""A run as a plain job of slurm/train.sbatch, from a directory like the repository."""

from pathlib import Path

import yaml
from tests.e2e.running import tiny_settings
from tests.slurm.cluster import REPOSITORY, Cluster
from tests.stand_in_server import stand_in_python
from tests.tiny_model import make_tiny_model

HARDWARE = {"hardware": {"nodes": 2, "cpus_per_node": 4, "placement": "separate_nodes", "server_nodes": 1}}


def make_clone(directory: Path) -> Path:
    """Returns a directory like the repository, with an experiment, that a job may write into."""
    clone = directory / "clone"
    clone.mkdir()
    for name in ("slurm", "sdpo_megatron", ".venv"):
        (clone / name).symlink_to(REPOSITORY / name)
    model, python = (
        make_tiny_model(directory / "model"),
        stand_in_python(directory / "stand_in", "--slow", "1.5"),
    )
    settings = tiny_settings(model, python, directory, run={"steps": 8}, checkpoint={"every": 100})
    (clone / "tiny.yaml").write_text(yaml.safe_dump(settings))
    (clone / "hardware.yaml").write_text(yaml.safe_dump(HARDWARE))
    return clone


def sbatch(cluster: Cluster, clone: Path, nodes: int) -> int:
    options = [
        *(
            "--parsable",
            f"--nodes={nodes}",
            "--cpus-per-task=4",
            "--mem=3000",
            "--partition=main",
            "--time=20",
        ),
        f"--output={cluster.shared}/%j.out",
    ]
    command = ["sbatch", *options, "slurm/train.sbatch", "tiny.yaml", "hardware.yaml", "run.seed=1"]
    return int(cluster.run(*command, cwd=clone))
