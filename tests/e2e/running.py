"""Whole runs of the command line on a tiny model, in processes of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from sdpo_megatron.run_dir.records_file import RecordedResponse, read_record

REPOSITORY = Path(__file__).resolve().parents[2]
WAIT_S = 240.0
STAND_IN_START_S = 120.0
REST_AND_PUSH = [
    "/pause_generation",
    "/flush_cache",
    "/release_memory_occupation kv_cache weights",
    "/pause_generation",
    "/flush_cache",
    "/resume_memory_occupation weights",
    "/begin_weight_update",
    "/end_weight_update",
    "/flush_cache",
    "/resume_memory_occupation kv_cache",
    "/continue_generation",
    "/weights_checker",
]
"""The control calls of a server that rests between a rollout and the push, without its buckets."""


def tiny_settings(
    model: Path, server_python: Path, directory: Path, **sections: dict[str, Any]
) -> dict[str, Any]:
    """Two-digit sums asked of a model that cannot know them: feedback, not success, is what the teacher has."""
    settings: dict[str, Any] = {
        "run": {"name": "tiny", "dir": str(directory / "runs"), "steps": 3, "device": "cpu"},
        "model": {"path": str(model), "dtype": "float32", "max_context_length": 512},
        "task": {"env": "equations", "options": {"feedback": "mistake"}},
        "rollout": {"problems_per_step": 2, "group_size": 2, "max_tokens": 6, "idle_timeout_s": 60.0},
        "server": {"python": str(server_python), "start_timeout_s": STAND_IN_START_S},
        "optimizer": {"lr": 1e-3, "warmup_steps": 0},
        "parallel": {"micro_batch_tokens": 512},
        "weight_sync": {"bucket_mb": 1, "timeout_s": 30.0},
        "eval": {"every": 2, "problems": 2, "exact_problems": 4},
        "checkpoint": {"every": 1},
        "log": {"phases_every_s": 0.0},
    }
    for name, values in sections.items():
        settings[name] = settings.get(name, {}) | values
    return settings


@dataclass
class Running:
    """One launcher process and what it leaves behind."""

    process: subprocess.Popen[str]
    directory: Path

    def phase(self) -> dict[str, Any]:
        path = self.directory / "phases" / "rank_0.json"
        return json.loads(path.read_text()) if path.exists() else {"step": -1, "phase": ""}

    def wait_for(self, condition: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert self.process.poll() is None, f"it ended before {what}:\n{self.output()}"
            assert time.monotonic() < deadline, f"waited in vain for {what}"
            time.sleep(0.005)

    def wait_for_phase(self, phase: str, step: int) -> None:
        self.wait_for(lambda: self._is_in(phase, step), f"{phase} in step {step}")

    def _is_in(self, phase: str, step: int) -> bool:
        now = self.phase()
        reached = -1 if now["step"] is None else now["step"]
        return reached >= step and now["phase"] == phase

    def server_pid(self) -> int:
        return json.loads((self.directory / "servers" / "0.json").read_text())["pid"]

    def server_url(self) -> str:
        return json.loads((self.directory / "servers" / "0.json").read_text())["url"]

    def rank_pid(self, rank: int) -> int:
        """Found by what the kernel says of the launcher's children."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and _environment(entry).get("RANK") == str(rank):
                if _parent(entry) == self.process.pid:
                    return int(entry.name)
        raise AssertionError(f"no process of rank {rank}")

    def end(self) -> int:
        """Waits for it; the exit code."""
        return self.process.wait(WAIT_S)

    def output(self) -> str:
        if self.process.poll() is None:
            self.process.kill()
        out, _ = self.process.communicate()
        return out

    def responses(self, step: int, split: str = "train") -> list[RecordedResponse]:
        return read_record(self.directory / "rollouts" / split / f"{step:06d}.jsonl")

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / "metrics.jsonl").read_text().splitlines()]


def _environment(entry: Path) -> dict[str, str]:
    try:
        pairs = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
    except (FileNotFoundError, PermissionError, ProcessLookupError):
        return {}
    return {pair.partition("=")[0]: pair.partition("=")[2] for pair in pairs}


def _parent(entry: Path) -> int:
    try:
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def start(settings: dict[str, Any], directory: Path) -> Running:
    path = directory / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    environment = {
        key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    run_directory = Path(settings["run"]["dir"]) / settings["run"]["name"]
    # what an earlier start was doing is not what this one does
    for phase in (run_directory / "phases").glob("*.json"):
        phase.unlink()
    process = subprocess.Popen(
        [sys.executable, "-m", "sdpo_megatron.train", str(path)],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return Running(process, run_directory)


def run(settings: dict[str, Any], directory: Path) -> Running:
    """To its end, which must be a good one."""
    running = start(settings, directory)
    out, _ = running.process.communicate(timeout=WAIT_S)
    assert running.process.returncode == 0, out
    return running


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def assert_complete(running: Running, steps: int) -> None:
    """Every step once and in order, and the last checkpoint."""
    assert [row["step"] for row in running.rows()] == list(range(steps + 1))
    assert (running.directory / "checkpoints" / f"{steps:06d}" / "manifest.json").exists()
