import json
import time
from pathlib import Path

import pytest

from sdpo_megatron.run_dir import phases as module
from sdpo_megatron.run_dir.phases import PhaseFile


def phase_in(path: Path) -> tuple[int, int, str]:
    now = json.loads(path.read_text())
    return now["rank"], now["step"], now["phase"]


def wait_for(path: Path, phase: str) -> float:
    began = time.monotonic()
    while not path.exists() or phase_in(path)[2] != phase:
        assert time.monotonic() - began < 10
        time.sleep(0.01)
    return time.monotonic() - began


def test_with_0_each_phase_is_written_at_once(tmp_path: Path):
    path = tmp_path / "rank_1.json"
    phases = PhaseFile(path, rank=1, every_s=0)
    before = time.time()
    for phase in ("rollout", "learn"):
        phases.enter(3, phase)
        assert phase_in(path) == (1, 3, phase)
    assert before <= json.loads(path.read_text())["since"] <= time.time()
    phases.close()


def test_short_phases_cost_nothing_and_one_that_lasts_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, written = tmp_path / "rank_0.json", []

    def counted(path: Path, text: str, durable: bool) -> None:
        written.append(json.loads(text)["phase"])
        path.write_text(text)

    monkeypatch.setattr(module, "write_atomically", counted)
    phases = PhaseFile(path, rank=0, every_s=0.2)
    for step in range(1000):
        phases.enter(step, "learn")
        phases.enter(step, "rest")
    phases.enter(1000, "push")
    entered = time.time()
    assert wait_for(path, "push") < 2
    # since it was entered, not since it was written
    assert abs(json.loads(path.read_text())["since"] - entered) < 0.1
    time.sleep(0.5)
    assert written.count("push") == 1 and len(written) < 10
    phases.enter(1000, "rest")
    phases.close()
    assert phase_in(path) == (0, 1000, "rest")


def test_a_file_that_cannot_be_written_ends_the_rank(tmp_path: Path):
    phases = PhaseFile(tmp_path / "gone" / "rank_0.json", rank=0, every_s=0.02)
    phases.enter(0, "learn")
    deadline = time.monotonic() + 10
    with pytest.raises(FileNotFoundError):
        while time.monotonic() < deadline:
            phases.enter(0, "learn")
            time.sleep(0.01)
    phases.close()
