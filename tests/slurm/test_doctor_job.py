"""The doctor's job on a real Slurm: two nodes that are fit, a link that is cut, and what Slurm refuses."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import yaml
from tests.slurm.cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
HARDWARE: dict[str, Any] = {"nodes": 3, "cpus_per_node": 2, "memory_gb_per_node": 4.0, "partition": "main"}


class Doctor:
    """slurm/doctor.py as a user runs it, in a directory that all nodes see."""

    def __init__(self, cluster: Cluster, shared: Path) -> None:
        self.cluster, self.shared = cluster, shared
        self.cache = shared / "cache"

    def start(self, options: Sequence[str] = (), **hardware: Any) -> subprocess.Popen[str]:
        file = self.shared / "hardware.yaml"
        file.write_text(yaml.safe_dump({"hardware": HARDWARE | hardware}))
        # a server of its own takes a minute to look at
        tiny = [str(ROOT / "yaml/demo_cpu.yaml"), "server.urls=[http://n1:1]", f"run.dir={self.shared}/runs"]
        return subprocess.Popen(
            [sys.executable, str(ROOT / "slurm/doctor.py"), str(file), *tiny, *options],
            cwd=self.shared,
            env=os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(self.cache), "COLUMNS": "160"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture
def doctor(cluster: Cluster, shared_dir: Path) -> Doctor:
    return Doctor(cluster, shared_dir)


def test_two_nodes_that_are_fit(doctor: Doctor):
    started = doctor.start()
    out, errors = started.communicate(timeout=150)
    assert started.returncode == 0, out + errors
    rows = [line for line in out.splitlines() if not line.startswith(" ")]
    for check in (
        "shared files",
        "link between nodes",
        "clocks of the nodes",
        "gloo ring between nodes",
        "memory",
    ):
        assert any(check in row for row in rows), check
    assert "n1, n2" in out and "2 nodes: " in out and "n2 reaches n1 at port " in out
    assert list((doctor.shared / "runs").iterdir()) == []
    assert doctor.cluster.jobs() == []
    (report,) = (doctor.cache / "sdpo_megatron/doctor").iterdir()
    assert report.name == "test_main.json"
    hosts = {finding["host"] for finding in json.loads(report.read_text())["findings"]}
    assert {"n1", "n2"} <= hosts


def test_a_cut_link_is_named_by_its_node(doctor: Doctor):
    """The link is cut while both nodes wait to begin."""
    wait = doctor.shared / "wait.sh"
    wait.write_text(
        f"#!/bin/sh\ntouch {doctor.shared}/$SLURMD_NODENAME-waits\n"
        f"while [ ! -e {doctor.shared}/go ]; do sleep 0.1; done\n"
    )
    wait.chmod(0o755)
    started = doctor.start(["--json"], srun_args=[f"--task-prolog={wait}"])
    doctor.cluster.wait_for(
        lambda: len([*doctor.shared.glob("n?-waits")]) == 2, "both nodes wait to begin", 60
    )
    doctor.cluster.cut("n2")
    (doctor.shared / "go").touch()
    out, errors = started.communicate(timeout=150)
    assert started.returncode == 1, out + errors
    findings = json.loads(out)
    found = [finding["found"] for finding in findings if finding["name"] == "link between nodes"]
    assert len(found) == 2 and all("n2" in line and "n1 at port" in line for line in found)
    assert not any("ring between" in finding["name"] for finding in findings)
    assert "Traceback" not in errors


def test_what_slurm_refuses_is_one_line_and_leaves_nothing(doctor: Doctor):
    started = doctor.start(partition="nowhere")
    out, errors = started.communicate(timeout=60)
    assert started.returncode == 1 and out == ""
    assert errors.startswith("error: Slurm does not take the job: ") and errors.count("\n") == 1
    assert "invalid partition" in errors
    assert not list((doctor.shared / "runs").iterdir()) and not doctor.cache.exists()


def test_who_ends_it_cancels_its_job(doctor: Doctor):
    started = doctor.start(setup=["sleep 60"])
    doctor.cluster.wait_for(lambda: doctor.cluster.jobs() != [], "the job is there", 60)
    (job,) = doctor.cluster.jobs()
    started.terminate()
    _, errors = started.communicate(timeout=60)
    assert started.returncode == 143 and "Traceback" not in errors, errors
    doctor.cluster.wait_for_state(job, "CANCELLED", seconds=30)
    assert not list((doctor.shared / "runs").iterdir())
