import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdpo_megatron.run_dir import phases as module
from sdpo_megatron.run_dir.phases import STACKS_ASKED_BY, PhaseFile, read_ending, read_phase, write_ending


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


def test_it_says_how_long_a_phase_took_before_and_when_it_last_got_on(tmp_path: Path):
    path = tmp_path / "rank_0.json"
    phases = PhaseFile(path, rank=0, every_s=0)
    phases.progress()
    assert read_phase(path) is None
    phases.enter(None, "start")
    for wait_s in (0.05, 0.2, 0.05):
        phases.enter(1, "learn")
        time.sleep(wait_s)
        phases.enter(1, "rest")
    phases.enter(2, "learn")
    entered = read_phase(path)
    assert (
        entered is not None
        and entered.longest_s is not None
        and entered.longest_s == pytest.approx(0.2, abs=0.1)
    )
    assert entered.progress == entered.since
    time.sleep(0.1)
    phases.progress()
    later = read_phase(path)
    assert later is not None and later.since == entered.since and later.progress >= entered.progress + 0.1
    phases.enter(2, "eval")
    first = read_phase(path)
    assert first is not None and first.longest_s is None
    phases.close()


def test_stacks_are_written_when_asked_also_while_python_waits(tmp_path: Path):
    path = tmp_path / "rank_0.stacks"
    code = f"""
import pathlib, time
from sdpo_megatron.run_dir.phases import write_stacks_when_asked
write_stacks_when_asked(pathlib.Path({str(path)!r}))
def deep_inside():
    print("ready", flush=True)
    time.sleep(60)
deep_inside()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for times in (1, 2):
        process.send_signal(STACKS_ASKED_BY)
        began = time.monotonic()
        while path.read_text().count("in deep_inside") < times:
            assert time.monotonic() - began < 10
            time.sleep(0.01)
    assert process.poll() is None
    process.kill()
    process.communicate()


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


def test_what_a_rank_states_of_its_end_is_read_back(tmp_path: Path):
    path = tmp_path / "rank_0.json"
    assert read_ending(path) is None
    write_ending(path, 1, "stopped: first")
    write_ending(path, 2, "error: ü\nlog")
    assert read_ending(path) == {"exit_code": 2, "message": "error: ü\nlog"}
    assert list(tmp_path.iterdir()) == [path]
