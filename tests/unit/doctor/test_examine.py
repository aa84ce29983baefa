"""Checks that raise, crash or hang cost their own line alone, and leave nothing."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from sdpo_megatron.doctor import examine as examining
from sdpo_megatron.doctor.examine import Check, examine
from sdpo_megatron.doctor.findings import Finding, ok

ROOT = Path(__file__).parents[3]
Started = Callable[[], list[psutil.Process]]


def fine() -> list[Finding]:
    return [ok("fine", "all is well", figure=1.5)]


def test_each_check_is_a_process_of_its_own_and_findings_keep_their_order():
    seen = examine(
        [
            Check(name="process", look=lambda: [ok("process", str(os.getpid()))]),
            Check(name="fine", look=lambda: [*fine(), *fine()]),
        ]
    )
    assert seen[0].found != str(os.getpid())
    assert seen[1:] == [*fine(), *fine()]


def raises() -> list[Finding]:
    raise ValueError("of two\nlines \udc80")


def crashes() -> list[Finding]:
    os.kill(os.getpid(), signal.SIGKILL)
    return []


def leaves() -> list[Finding]:
    sys.exit(3)


@pytest.mark.parametrize(
    ("look", "found"),
    [
        (raises, r"the check failed with ValueError: of two\nlines \udc80"),
        (crashes, "the check's process crashed (SIGKILL)"),
        (leaves, "the check's process crashed (code 1)"),
    ],
)
def test_a_check_that_fails_is_a_line_by_name_and_the_next_is_looked_at(look, found):
    broken, after = examine([Check(name="broken", look=look), Check(name="fine", look=fine)])
    assert (broken.name, broken.status, broken.found) == ("broken", "failure", found)
    assert broken.todo and after == fine()[0]


def test_what_a_check_prints_goes_nowhere(capfd: pytest.CaptureFixture[str]):
    def prints() -> list[Finding]:
        os.write(1, b"out")
        os.write(2, b"err")
        return fine()

    assert examine([Check(name="prints", look=prints)]) == fine()
    assert capfd.readouterr() == ("", "")


def test_one_that_hangs_is_ended_with_what_it_started_and_made(tmp_path: Path):
    def hangs() -> list[Finding]:
        made = tmp_path / "made"
        made.mkdir()
        try:
            started = subprocess.Popen(["sleep", "600"])
            (tmp_path / "pid").write_text(str(started.pid))
            time.sleep(600)
        finally:
            made.rmdir()
        return []

    start = time.monotonic()
    (finding,) = examine([Check(name="slow", look=hangs, limit_s=1.5, if_it_hangs="wait")])
    assert (finding.status, finding.found, finding.todo) == ("failure", "no answer within 1.5 s", "wait")
    assert time.monotonic() - start < 30
    assert not (tmp_path / "made").exists()
    assert gone(int((tmp_path / "pid").read_text()))


def test_one_that_does_not_listen_is_killed(monkeypatch: pytest.MonkeyPatch, started_here: Started):
    def deaf() -> list[Finding]:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
        return []

    monkeypatch.setattr(examining, "TIDY_S", 0.3)
    (finding,) = examine([Check(name="deaf", look=deaf, limit_s=0.3)])
    assert finding.status == "failure" and not started_here()


def test_all_together_have_a_limit():
    slow = Check(name="slow", look=lambda: time.sleep(600) or [])
    first, second = examine([slow, Check(name="fine", look=fine)], total_s=0.3)
    assert first.found == "no answer within 0.3 s"
    assert (second.name, second.status) == ("fine", "failure")
    assert second.found == "not looked at: the checks before took too long"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_check_ends_with_the_command_and_tidies_up(number: signal.Signals, tmp_path: Path):
    code = """
import signal, sys, tempfile, time
from pathlib import Path
from sdpo_megatron.doctor.asking import ask
from sdpo_megatron.doctor.examine import Check, examine
def hangs():
    with tempfile.TemporaryDirectory(dir=sys.argv[1]):
        ask(["sh", "-c", "echo $$ > $0/pid; exec sleep 600", sys.argv[1]], 600)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
examine([Check(name="x", look=hangs, limit_s=600)])
"""
    doctor = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 20
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    doctor.send_signal(number)
    assert doctor.wait(10) != 0
    assert gone(int((tmp_path / "pid").read_text()))
    deadline = time.monotonic() + 5
    while [path.name for path in tmp_path.iterdir()] != ["pid"] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [path.name for path in tmp_path.iterdir()] == ["pid"]


def gone(pid: int) -> bool:
    """Waits a moment for a process that was killed and is not ours to wait for."""
    for _ in range(200):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False
