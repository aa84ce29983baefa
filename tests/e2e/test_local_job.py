"""The job that Slurm would run, on this machine: preempted, killed and stopped. The server is the stand-in, all else is
real."""

import json
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

import yaml
from sdpo_megatron.job.state import number_of
from sdpo_megatron.job.this_machine import runs_here, task_of
from sdpo_megatron.launch.processes import wait_until
from sdpo_megatron.run_dir.phases import read_phase
from slurm import status, stop, submit
from tests.e2e.running import tiny_settings
from tests.stand_in_server import stand_in_python

HARDWARE = {"hardware": {"cpus_per_node": 2, "time_limit": "00:20:00"}}
WAIT_S = 240.0


class LocalJob:
    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        for name, values in {"tiny.yaml": settings, "hardware.yaml": HARDWARE}.items():
            (directory / name).write_text(yaml.safe_dump(values))
        self.run = Path(settings["run"]["dir"]) / settings["run"]["name"]
        self.arguments = [str(directory / "tiny.yaml"), str(directory / "hardware.yaml"), "--local"]
        assert submit.main(self.arguments) == 0

    def task(self) -> psutil.Process:
        task = task_of(number_of(self.run))
        assert task is not None, self.output()
        return task

    def wait_for_phase(self, phase: str, step: int) -> None:
        def is_in() -> bool:
            now = read_phase(self.run / "phases" / "rank_0.json")
            return now is not None and now.step is not None and now.step >= step and now.phase == phase

        assert wait_until(is_in, WAIT_S), self.output()

    def attempts(self) -> list[dict[str, Any]]:
        path = self.run / "job" / "attempts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def end(self) -> None:
        assert wait_until(lambda: not runs_here(number_of(self.run)), WAIT_S), self.output()

    def steps(self) -> list[int]:
        return [json.loads(line)["step"] for line in (self.run / "metrics.jsonl").read_text().splitlines()]

    def output(self) -> str:
        return "".join(path.read_text() for path in (self.run / "job" / "submitit").glob("*_log.out"))


@pytest.fixture
def settings(tiny_model: Any, tmp_path: Path) -> dict[str, Any]:
    server = stand_in_python(tmp_path / "stand_in", "--slow", "0.05")
    return tiny_settings(
        *(tiny_model(), server, tmp_path),
        run={"steps": 10},
        parallel={"micro_batch_tokens": 512, "dp": 2},
        checkpoint={"every": 100},
    )


def test_a_preempted_job_comes_back_and_one_that_is_stopped_does_not(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    job = LocalJob(tmp_path, settings)
    out = capsys.readouterr().out
    assert f"Started as {number_of(job.run)}. Run directory: {job.run}, with logs in logs/latest\n" in out
    assert submit.main(job.arguments) == 2
    assert f"{job.run} is job {number_of(job.run)} already, which is running" in capsys.readouterr().err
    job.wait_for_phase("rollout", 2)
    job.task().send_signal(signal.SIGUSR2)
    assert wait_until(lambda: len(job.attempts()) == 1, WAIT_S), job.output()
    job.wait_for_phase("learn", 3)
    assert status.main([str(job.run)]) == 0
    said = capsys.readouterr().out
    assert "running on this machine\n" in said and "    attempt 0: preempted after " in said
    assert stop.main([str(job.run)]) == 0
    job.end()
    first, second = job.attempts()
    assert (first["why"], second["why"]) == ("preempted", "asked") and second["steps"] > first["steps"] >= 2
    assert status.main([str(job.run)]) == 0
    assert "stopped, and saved" in capsys.readouterr().out
    assert submit.main(job.arguments) == 0
    job.end()
    assert job.attempts()[-1]["why"] == "finished" and job.steps() == list(range(11))
    assert "Traceback" not in job.output()


def test_a_job_whose_own_process_is_killed_leaves_nothing_behind_and_comes_back(
    settings: dict[str, Any], tmp_path: Path
):
    settings["checkpoint"]["every"] = 1
    job = LocalJob(tmp_path, settings)
    job.wait_for_phase("learn", 2)
    (attempt,) = job.task().children()
    others = attempt.children(recursive=True)
    assert len(others) >= 3
    attempt.kill()
    gone, alive = psutil.wait_procs(others, timeout=30)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE], alive
    job.end()
    first, second = job.attempts()
    assert first["reason"] == "the job's own process was ended by SIGKILL" and second["why"] == "finished"
    assert job.steps() == list(range(11))


def test_what_cannot_be_here_is_refused(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for name, values in {"tiny.yaml": settings, "hardware.yaml": HARDWARE}.items():
        (tmp_path / name).write_text(yaml.safe_dump(values))
    arguments = [str(tmp_path / "tiny.yaml"), str(tmp_path / "hardware.yaml"), "--local"]
    assert submit.main([*arguments, "hardware.nodes=2"]) == 2
    errors = capsys.readouterr().err
    assert "--local has this machine alone, and hardware.nodes is 2: set hardware.nodes=1" in errors
    assert submit.main([*arguments, "--sweep=optimizer.lr=1,2"]) == 2
    assert "--local is for one run, and --sweep makes several" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
