"""A sweep on a real Slurm: one array, a run for each element, and none that disturbs another."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import yaml
from sdpo_megatron.job.description import JobDirectory, read_attempts
from sdpo_megatron.job.state import number_of
from sdpo_megatron.run_dir.metrics_file import read_rows
from sdpo_megatron.run_dir.phases import read_phase
from slurm import status, stop, submit
from tests.e2e.running import tiny_settings
from tests.slurm.cluster import REPOSITORY, Cluster
from tests.stand_in_server import stand_in_python
from tests.tiny_model import make_tiny_model

HARDWARE = {
    "hardware": {
        "nodes": 1,
        "cpus_per_node": 4,
        "memory_gb_per_node": 6.0,
        "placement": "colocated",
        "time_limit": "00:20:00",
        "partition": "main",
    }
}


@pytest.fixture(scope="module")
def engines(started_cluster: Cluster) -> tuple[Path, Path]:
    """A model and the stand-in server's interpreter, where all nodes see them."""
    model = make_tiny_model(started_cluster.shared / "array_model")
    return model, stand_in_python(started_cluster.shared / "array_stand_in")


class Sweep:
    """Two runs of the tiny model, in one array."""

    def __init__(self, shared: Path, settings: dict[str, Any]) -> None:
        for name, values in {"tiny.yaml": settings, "hardware.yaml": HARDWARE}.items():
            (shared / name).write_text(yaml.safe_dump(values))
        files = [str(shared / name) for name in ("tiny.yaml", "hardware.yaml")]
        assert submit.main([*files, "--sweep", "optimizer.lr=1e-3,1e-4"]) == 0
        self.runs = [shared / "runs" / f"tiny-optimizer.lr_{lr}" for lr in ("1e-3", "1e-4")]
        self.jobs = [number_of(run) for run in self.runs]

    def steps(self, run: Path) -> list[int]:
        return [int(row["step"]) for row in read_rows(run / "metrics.jsonl")]

    def ends(self, run: Path) -> list[str]:
        return [attempt.why for attempt in read_attempts(JobDirectory(run / "job"))]


def test_of_two_arrays_one_completes_and_one_has_an_element_that_is_preempted_and_one_that_is_stopped(
    cluster: Cluster, shared_dir: Path, engines: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
):
    (shared_dir / "whole").mkdir()
    whole = Sweep(shared_dir / "whole", tiny_settings(*engines, shared_dir / "whole", run={"steps": 3}))
    array, _, place = whole.jobs[1].partition("_")
    assert place == "1" and whole.jobs[0] == f"{array}_0"
    (shared_dir / "parted").mkdir()
    # far from its end when it is told to
    slow = stand_in_python(shared_dir / "slow_stand_in", "--slow", "0.1")
    settings = tiny_settings(
        *(engines[0], slow, shared_dir / "parted"), run={"steps": 8}, checkpoint={"every": 100}
    )
    parted = Sweep(shared_dir / "parted", settings)
    check_parted(cluster, parted)
    check_whole(cluster, whole)
    capsys.readouterr()
    assert status.main([str(run) for run in whole.runs]) == 0
    shown = capsys.readouterr().out
    assert all(
        f"{run.name}, job {job}: finished" in shown for run, job in zip(whole.runs, whole.jobs, strict=True)
    )


def check_whole(cluster: Cluster, sweep: Sweep) -> None:
    for job in sweep.jobs:
        cluster.wait_for_state(job, "COMPLETED", seconds=400)
    for run in sweep.runs:
        assert sweep.steps(run) == [0, 1, 2, 3] and sweep.ends(run) == ["finished"]
        # each ran its own copy
        log = next((run.parent / "tiny.sweep" / "submitit").glob(f"{number_of(run)}_*log.out"))
        assert f"with the package in {run}/job/code. Logs: " in log.read_text()
    command = [sys.executable, str(REPOSITORY / "tools" / "summarize_runs.py"), *map(str, sweep.runs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and all(run.name in done.stdout for run in sweep.runs), done


def check_parted(cluster: Cluster, sweep: Sweep) -> None:
    """Has the last element preempted and the other one stopped; neither disturbs the other."""
    other, last = sweep.runs

    def learns(run: Path, step: int) -> bool:
        now = read_phase(run / "phases" / "rank_0.json")
        return now is not None and now.step is not None and now.step >= step

    cluster.wait_for(lambda: all(learns(run, 2) for run in sweep.runs), "both learn", 300)
    # the last one's number is the array's
    assert cluster.job(sweep.jobs[1])["JobId"] == sweep.jobs[1].partition("_")[0]
    cluster.run("scancel", "--batch", "--signal=USR2", sweep.jobs[1])
    assert stop.main([str(other)]) == 0
    cluster.wait_for(lambda: sweep.ends(last) == ["preempted"], "it saves", 120)
    cluster.wait_for(lambda: sweep.ends(other) == ["asked"], "the other one saves", 120)
    cluster.wait_for_state(sweep.jobs[1], "COMPLETED", seconds=300)
    assert sweep.steps(last) == list(range(9)) and sweep.ends(last) == ["preempted", "finished"]
    assert sweep.ends(other) == ["asked"] and cluster.job(sweep.jobs[0])["Restarts"] == "0"
