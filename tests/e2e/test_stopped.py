"""Runs that are asked to stop in every phase, by every signal, and ranks that hang there. The server is the stand-in,
all else is real."""

import json
import os
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from tests.e2e.running import Running, assert_complete, run, start, tiny_settings

TERM, INT, HUP, STOP, CONT = (
    *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP),
    *(signal.SIGSTOP, signal.SIGCONT),
)
STOPS: list[tuple[str, Sequence[int]]] = [
    *(
        ("start", [TERM]),
        ("server_start", [HUP]),
        ("eval", [INT]),
        ("rollout", [HUP]),
        ("teacher", [TERM, INT]),
    ),
    *(("learn", [INT, HUP]), ("push", [HUP, TERM]), ("checkpoint", [TERM])),
]
PHASES = ["start", "eval", "rollout", "teacher", "learn", "push", "checkpoint"]


def saved_steps(running: Running) -> int:
    """Of the newest checkpoint, which must be the only one."""
    names = [path.name for path in (running.directory / "checkpoints").glob("[0-9]*")]
    assert len(names) <= 1
    return max(map(int, names), default=0)


def test_in_every_phase_signals_alone_and_together_end_with_all_saved(tiny_model, stand_in, tmp_path):
    settings = tiny_settings(
        tiny_model(),
        stand_in,
        tmp_path,
        run={"steps": 100},
        checkpoint={"every": 100, "keep": 1},
        eval={"every": 1},
    )
    before = 0
    for phase, signals in STOPS:
        running = start(
            settings | ({"checkpoint": {"every": 1, "keep": 1}} if phase == "checkpoint" else {}), tmp_path
        )
        running.wait_for_phase(phase, -1)
        for number in signals:
            os.kill(running.process.pid, number)
        # of two at once the system chooses which comes first
        assert running.end() in [128 + number for number in signals], (phase, signals, running.output())
        rows = running.rows() if (running.directory / "metrics.jsonl").is_file() else []
        # of each step that was made, nothing is lost
        assert saved_steps(running) >= max(len(rows), before), (phase, signals)
        assert "Traceback" not in running.output()
        before = saved_steps(running)
    # those of teacher, learn and checkpoint; a rollout may end with its step, and the first push has none
    assert before >= 3
    settings["run"]["steps"] = before + 1
    assert_complete(run(settings, tmp_path), before + 1)


def processes_of(launcher: int) -> list[int]:
    """The launcher and its children, the one that clears up behind them too."""
    return [launcher, *(child.pid for child in psutil.Process(launcher).children())]


@pytest.mark.parametrize("phase", ["start", "rollout"])
def test_a_signal_to_launcher_ranks_and_server_at_once_is_one_to_the_launcher(
    tiny_model, stand_in, tmp_path, monkeypatch, phase
):
    settings = tiny_settings(tiny_model(), stand_in, tmp_path, checkpoint={"every": 100})
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    running = start(settings, tmp_path)
    running.wait_for_phase(phase, -1)
    # as pkill does it: in no order that helps
    for pid in [running.server_pid(), *processes_of(running.process.pid)]:
        os.kill(pid, TERM)
    assert running.end() == 143, running.output()
    # what clears up behind them goes last
    deadline = time.monotonic() + 10
    while (left := list((tmp_path / "tmp").iterdir())) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []
    assert "Traceback" not in running.output()
    assert_complete(run(settings, tmp_path), 3)


def rank_phase(running: Running, rank: int) -> str:
    path = running.directory / "phases" / f"rank_{rank}.json"
    return json.loads(path.read_text())["phase"] if path.is_file() else ""


def stop_rank_in(running: Running, rank: int, phase: str) -> int:
    """Returns its process id."""
    while True:
        running.wait_for(lambda: rank_phase(running, rank) == phase, phase)
        pid = running.rank_pid(rank)
        os.kill(pid, STOP)
        if rank_phase(running, rank) == phase:
            return pid
        os.kill(pid, CONT)


def named(running: Running) -> str:
    path: Path = running.directory / "logs" / "diagnosis.txt"
    return path.read_text().splitlines()[0] if path.is_file() else ""


def test_a_rank_that_is_stopped_is_named_in_every_phase_and_goes_on(tiny_model, stand_in, tmp_path):
    settings = tiny_settings(
        *(tiny_model(), stand_in, tmp_path),
        run={"steps": 20},
        parallel={"micro_batch_tokens": 512, "dp": 2},
        eval={"every": 1},
    )
    running = start(settings, tmp_path)
    for number, phase in enumerate(PHASES):
        rank = number % 2
        pid = stop_rank_in(running, rank, phase)
        told = f"rank {rank} (process {pid}) is stopped"
        running.wait_for(lambda told=told: told in named(running), f"{told} in {phase}")
        assert f"in phase {phase}" in named(running)
        (running.directory / "logs" / "diagnosis.txt").unlink()
        os.kill(pid, CONT)
    assert running.end() == 0
    out = running.output()
    assert re.findall(r"is stopped, .* in phase (\w+)", out) == PHASES and "Traceback" not in out
    assert_complete(running, 20)


def test_a_rank_that_stays_stopped_ends_the_run_with_its_step_saved(tiny_model, stand_in, tmp_path):
    settings = tiny_settings(
        *(tiny_model(), stand_in, tmp_path),
        run={"steps": 20, "hang_timeout_s": 1.0},
        parallel={"micro_batch_tokens": 512, "dp": 2},
        checkpoint={"every": 100},
    )
    running = start(settings, tmp_path)
    running.wait_for_phase("learn", 1)
    stop_rank_in(running, 1, "learn")
    assert running.end() == 1
    out = running.output()
    assert re.search(
        r"Stopping \(run\.hang_timeout_s=1 s are over: rank 1 .* is stopped, .* in phase learn", out
    )
    saved = saved_steps(running)
    assert saved >= 2 and f"after {saved} of 20 steps, which are saved" in out and "Traceback" not in out
    settings["run"]["steps"] = saved + 1
    assert_complete(run(settings, tmp_path), saved + 1)
