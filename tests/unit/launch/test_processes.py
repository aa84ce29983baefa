"""One child process: its log, how it ends, and what it leaves behind."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdpo_megatron.errors import RunFailed
from sdpo_megatron.launch import processes
from sdpo_megatron.launch.kill_orphans import group_members
from sdpo_megatron.launch.processes import ChildProcess, Guard, wait_until
from tests.e2e.watching import shared_memory


def child(tmp_path: Path, script: str) -> ChildProcess:
    return ChildProcess(["/bin/sh", "-c", script], os.environ, tmp_path / "logs" / "log")


@pytest.mark.parametrize(
    ("script", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -USR1 $$", -signal.SIGUSR1)]
)
def test_the_exit_code_is_known_before_and_after_the_end(tmp_path: Path, script: str, code: int):
    process = child(tmp_path, script)
    assert wait_until(process.ended, 10)
    assert process.exit_code() == code
    assert process.end() == code


def test_asked_to_stop_it_has_the_time_to(tmp_path: Path):
    process = child(tmp_path, "trap 'sleep 0.3; exit 5' TERM; echo ready; while :; do sleep 0.05; done")
    assert wait_until(lambda: process.log_end() == ["ready"], 10)
    assert process.exit_code() is None
    assert process.end(grace_s=10) == 5


def test_what_does_not_stop_is_killed_with_its_children(tmp_path: Path):
    process = child(tmp_path, "trap '' TERM; sleep 100 & echo ready; wait")
    assert wait_until(lambda: process.log_end() == ["ready"], 10)
    assert process.end(grace_s=0.2) == -signal.SIGKILL
    assert group_members(process.pid) == []


def test_what_outlives_sigkill_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    process = child(tmp_path, "sleep 100")
    with monkeypatch.context() as patch:
        patch.setattr(processes, "KILL_GRACE_S", 0.1)
        patch.setattr(process, "kill", lambda: None)
        with pytest.raises(RunFailed, match=f"group {process.pid} outlived SIGKILL by 0.1 seconds"):
            process.end()
    process.end()


def test_only_this_processs_lines_are_shown(tmp_path: Path):
    for text in ("first", "second"):
        process = child(tmp_path, f"echo {text}; echo; echo {text} error >&2")
        assert wait_until(process.ended, 10)
        process.end()
        assert process.log_end() == [text, f"{text} error"]


def test_on_the_terminal_errors_are_logged_as_well(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    command = [sys.executable, "-c", "import sys; print('out', flush=True); print('err', file=sys.stderr)"]
    process = ChildProcess(command, os.environ, tmp_path / "log", on_terminal=True)
    assert wait_until(process.ended, 10) and process.end() == 0
    assert capfd.readouterr() == ("out\n", "err\n")
    assert process.log_end() == ["err"]


def test_a_process_may_have_any_bytes_for_a_name(tmp_path: Path):
    """One of another user, say; its name is none of ours to read."""
    program = str(tmp_path / os.fsdecode(b"\xff\xfe"))
    shutil.copy(shutil.which("sleep") or "/bin/sleep", program)
    odd = subprocess.Popen([program, b"30"])
    try:
        assert wait_until(lambda: b"\xff" in Path(f"/proc/{odd.pid}/stat").read_bytes(), 5.0)
        assert os.getpid() in group_members(os.getpgrp())
    finally:
        odd.kill()
        odd.wait()


SEGMENTS = """
import mmap, os, sys, time
from multiprocessing import get_context, resource_tracker
from multiprocessing.shared_memory import SharedMemory
lock = get_context("spawn").Lock()  # a named semaphore
memory = SharedMemory(create=True, size=100)
with open(f"/dev/shm/weights-{os.getpid()}", "w+b") as file:  # not of a name that such a library gives
    file.truncate(100)
    mapped = mmap.mmap(file.fileno(), 100)
print("made", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("how", ["released", "closed"])
def test_the_guard_removes_what_a_group_left(tmp_path: Path, how: str):
    """As kill -9 leaves it: also the tracker that Python has for this is killed with its group."""

    def of(process: ChildProcess) -> set[str]:
        return {path.name for path in shared_memory(group_members(process.pid))}

    def segments() -> set[str]:
        return set(os.listdir("/dev/shm"))

    guard, directory = Guard(), tmp_path / "private"
    directory.mkdir()
    (directory / "socket").touch()
    command, logs = [sys.executable, "-c", SEGMENTS], tmp_path / "logs"
    watched, other = (ChildProcess(command, os.environ, logs / name) for name in ("watched", "other"))
    guard.watch(watched.pid, directory)
    assert wait_until(lambda: watched.log_end() == other.log_end() == ["made"], 20)
    ours, theirs = of(watched), of(other)
    assert len(ours) == len(theirs) == 3
    time.sleep(1.0)
    watched.kill()
    if how == "released":
        watched.end()
        guard.release(watched.pid)
    assert how == "closed" or wait_until(lambda: not directory.exists(), 10)
    guard.close()
    left = {name for name in ours if name in segments()}
    assert not directory.exists() and left == {f"weights-{watched.pid}"}
    assert theirs <= segments()
    if how == "closed":
        watched.end()
    other.end()
    for name in left | theirs:
        Path("/dev/shm", name).unlink(missing_ok=True)
