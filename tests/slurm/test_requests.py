"""Requests that this cluster can never run are refused before anything is written or submitted."""

from pathlib import Path
from typing import Any

import pytest

import yaml
from sdpo_megatron.terminal import script
from slurm import submit
from tests.e2e.running import tiny_settings
from tests.slurm.cluster import Cluster
from tests.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def experiment(model: Path, shared_dir: Path) -> Path:
    path = shared_dir / "tiny.yaml"
    settings = tiny_settings(model, Path("/usr/bin/python3"), shared_dir)
    path.write_text(yaml.safe_dump(settings))
    return path


def refused(
    experiment: Path, hardware: dict[str, Any], capsys: pytest.CaptureFixture[str], *arguments: str
) -> str:
    path = experiment.with_name("hardware.yaml")
    path.write_text(yaml.safe_dump({"hardware": hardware}))
    assert submit.main([str(experiment), str(path), *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


def test_what_this_cluster_can_never_run(
    cluster: Cluster, experiment: Path, capsys: pytest.CaptureFixture[str]
):
    cluster.run("scontrol", "update", "PartitionName=high", "State=DOWN")
    try:
        for hardware, message in [
            ({"partition": "gpux"}, "does not have: take one of main (the default), high, short."),
            ({"partition": "high"}, "partition high is down, and starts no job: take main or short."),
            ({"nodes": 9}, "hardware.nodes is 9, and partition main has 4 in all: make it 4 or less."),
            ({"gpus_per_node": 8}, "no node of partition main has more than 2 GPUs: make it 2 or less."),
            (
                {"gpus_per_node": 1, "gpu_type": "h100"},
                "hardware.gpu_type is h100, which no node of partition",
            ),
            ({"cpus_per_node": 64}, "a job has 16 CPUs at most on a node of partition main"),
            ({"memory_gb_per_node": 64.0}, "no node of partition main has more than 16 GB"),
            (
                {"constraint": "ib"},
                "no node of partition main has the feature ib: leave it out, as its nodes have none",
            ),
            ({"partition": "short", "time_limit": "00:03:00"}, "and partition short allows 00:02:00"),
        ]:
            assert message in refused(experiment, hardware, capsys)
    finally:
        cluster.run("scontrol", "update", "PartitionName=high", "State=UP")
    assert cluster.jobs() == [] and not (experiment.parent / "runs").exists()


def test_nodes_of_several_kinds(cluster: Cluster, experiment: Path, capsys: pytest.CaptureFixture[str]):
    cluster.run("scontrol", "update", "NodeName=n4", "AvailableFeatures=ib", "ActiveFeatures=ib")
    try:
        said = refused(experiment, {"nodes": 2, "constraint": "ib"}, capsys, "parallel.dp=2")
    finally:
        cluster.run("scontrol", "update", "NodeName=n4", "AvailableFeatures=", "ActiveFeatures=")
    assert "only 1 of the 4 nodes of partition main have 1 CPU and the features ib" in said
    assert cluster.jobs() == []


def test_a_place_of_each_node_s_own_and_a_run_that_is_active(
    cluster: Cluster,
    experiment: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    said = refused(experiment, {"nodes": 1}, capsys, "run.dir=/dev/shm/runs")
    assert "The run directory /dev/shm/runs/tiny is in this machine's memory" in said
    job = cluster.submit("sleep 1", "--hold")
    run = experiment.parent / "runs" / "tiny"
    (run / "job").mkdir(parents=True)
    (run / "job" / "number").write_text(f"{job}\n")
    said = refused(experiment, {"nodes": 1}, capsys)
    assert (
        f"{run} is job {job} already, which waits (JobHeldUser): see {script('slurm/status.py', run)}" in said
    )
    assert cluster.jobs() == [job]
