"""Runs of a tiny model in jobs of the cluster: two nodes train and one serves. The server is the stand-in that samples
repeatably, all else is real."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

import yaml
from sdpo_megatron.job import place
from sdpo_megatron.run_dir.phases import read_phase
from slurm import submit
from tests.e2e.running import tiny_settings
from tests.slurm.cluster import Cluster, ClusterError

HARDWARE: dict[str, Any] = {
    "nodes": 3,
    "cpus_per_node": 3,
    "memory_gb_per_node": 3.0,
    "placement": "separate_nodes",
    "server_nodes": 1,
    "time_limit": "00:20:00",
    "partition": "main",
}
ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
MEASURED = ("time/", "memory/", "perf/", "push/", "rollout/", "grading/")
"""Parts of a row's keys whose values depend on the clock, or on what else the machine does."""


def job_settings(
    engines: tuple[Path, Path], directory: Path, *, name: str = "tiny", steps: int
) -> dict[str, Any]:
    """What two nodes train: four ranks' worth of everything, in seconds."""
    return tiny_settings(
        *(*engines, directory),
        run={"name": name, "steps": steps},
        parallel={"micro_batch_tokens": 512, "dp": 2},
        checkpoint={"every": 2, "keep": 2},
    )


@contextmanager
def as_on_a_login_node(cluster: Cluster) -> Iterator[None]:
    """Has this process find the commands of Slurm, and take the cluster's directories for shared, which they are."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PATH", "SLURM_CONF"):
            patch.setenv(name, cluster.environment[name])
        patch.setattr(place, "NODE_LOCAL", ())
        yield


class Submitted:
    """A run that Slurm was given."""

    def __init__(self, cluster: Cluster, directory: Path, settings: dict[str, Any], **hardware: Any) -> None:
        name = settings["run"]["name"]
        files = {f"{name}.yaml": settings, f"{name}_hardware.yaml": {"hardware": HARDWARE | hardware}}
        for file, values in files.items():
            (directory / file).write_text(yaml.safe_dump(values))
        self.cluster = cluster
        self.arguments = [str(directory / file) for file in files]
        self.run = Path(settings["run"]["dir"]) / name
        self.submit()

    def submit(self) -> None:
        before = set(self.cluster.jobs())
        assert submit.main(self.arguments) == 0
        (self.job,) = set(self.cluster.jobs()) - before

    # What it leaves

    def rows(self) -> list[dict[str, Any]]:
        path = self.run / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def values(self) -> list[dict[str, Any]]:
        """What a run that is not interrupted has, too: rows without what is measured by the clock."""
        return [
            {key: value for key, value in row.items() if not key.startswith(MEASURED)} for row in self.rows()
        ]

    def output(self) -> str:
        return "".join(path.read_text() for path in sorted((self.run / "job" / "submitit").glob("*_log.out")))

    def attempts(self) -> list[dict[str, Any]]:
        path = self.run / "job" / "attempts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    # What it does

    def wait_for(self, happened: Callable[[], Any], what: str, seconds: float = 480.0) -> None:
        """As the cluster's, for what lasts for milliseconds."""
        end = time.monotonic() + seconds
        while not happened():
            if time.monotonic() > end:
                raise ClusterError(f"waited in vain until {what}\n{self.cluster.status()}\n{self.output()}")
            time.sleep(0.003)

    def wait_for_phase(self, phase: str, step: int, *, or_later: bool = False) -> None:
        """With `or_later` the step behind is enough: some phases last for a moment."""

        def is_in() -> bool:
            now = read_phase(self.run / "phases" / "rank_0.json")
            if now is None or now.step is None:
                return False
            return (now.step >= step and now.phase == phase) or (or_later and now.step > step)

        self.wait_for(is_in, f"{self.run.name} is in {phase} of step {step}")

    def wait_for_attempt(self, number: int) -> None:
        """Waits until it trains in attempt `number`, counted from 0."""
        begun = self.run / "job" / "begun"
        self.wait_for(lambda: begun.is_file() and int(begun.read_text() or 0) > number, f"attempt {number}")

    def state(self) -> str:
        return self.cluster.job(self.job)["JobState"]

    def end(self, state: str = "COMPLETED", seconds: float = 480.0) -> None:
        """Waits for the job's end, which must be this one."""
        self.cluster.wait_for(lambda: self.state() in ENDS, "the job's end", seconds)
        assert self.state() == state, self.output()

    # Where it runs

    def processes(self, program: str) -> list[psutil.Process]:
        """Returns its processes whose command lines hold `program`, on all nodes."""
        found = []
        for node in self.cluster.states():
            for process in self.cluster.processes(node):
                try:
                    line = " ".join(process.cmdline())
                except psutil.Error:
                    continue
                if program in line and str(self.run) in line:
                    found.append(process)
        return found

    def rank(self, number: int) -> psutil.Process:
        """Returns the process of a rank."""
        for process in self.processes("sdpo_megatron.job.rank"):
            # srun has it in its command line, too
            if process.name() != "srun" and process.environ().get("SLURM_PROCID") == str(number):
                if "SLURM_STEP_ID" in process.environ():
                    return process
        raise AssertionError(f"no process of rank {number}")

    def server(self, program: str = "stand_in_server") -> list[psutil.Process]:
        """Returns the processes of the server itself, whose command lines hold `program`, below that of its step."""
        tasks = self.processes("sdpo_megatron.job.server")
        children = [
            child for task in tasks if task.name() != "srun" for child in task.children(recursive=True)
        ]
        return [child for child in children if program in " ".join(child.cmdline())]

    def node_of(self, process: psutil.Process) -> str:
        return process.environ()["SLURMD_NODENAME"]


def assert_complete(submitted: Submitted, steps: int) -> None:
    """Every step once, and all evaluations."""
    assert [row["step"] for row in submitted.rows()] == list(range(steps + 1))
    assert submitted.attempts()[-1]["why"] == "finished" and submitted.attempts()[-1]["steps"] == steps
