"""Of two attempts only the newer one works."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdpo_megatron.errors import RunFailed
from sdpo_megatron.job import fence
from sdpo_megatron.job.fence import is_superseded, wait_for_earlier
from sdpo_megatron.run_dir.directory import RunDirectory, lock_owner

WORKS = """import sys, time; from pathlib import Path; from sdpo_megatron.job import fence
fence.LOOK_S = 0.1
fence.end_with_attempt(Path(sys.argv[1]), 1); print("works", flush=True); time.sleep(60)"""
HOLDS = """import sys, time; from pathlib import Path; from sdpo_megatron.run_dir.directory import _lock
_lock(Path(sys.argv[1])); print("holds", flush=True); time.sleep(float(sys.argv[2]))"""


@pytest.mark.parametrize(
    ("begun", "superseded"), [("2\n", False), ("3\n", True), ("1\n", False), ("", False), (None, False)]
)
def test_who_is_superseded(tmp_path: Path, begun: str | None, superseded: bool):
    if begun is not None:
        (tmp_path / "begun").write_text(begun)
    assert is_superseded(tmp_path / "begun", 1) == superseded


def test_a_process_ends_as_soon_as_another_attempt_has_begun(tmp_path: Path):
    begun = tmp_path / "begun"
    begun.write_text("2\n")
    with subprocess.Popen(
        [sys.executable, "-c", WORKS, str(begun)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "works\n"
        time.sleep(0.5)
        assert process.poll() is None
        begun.write_text("3\n")
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 3
    assert errors == "stopped: another attempt than 1 of this job has begun.\n"


def test_what_is_left_of_an_earlier_attempt_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wait_for_earlier(RunDirectory(tmp_path))
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path), "2"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "holds\n"
        monkeypatch.setattr(fence, "LEAVES_WITHIN_S", 0.2)
        with pytest.raises(
            RunFailed, match="is in use by another process for 0.2 s, of an earlier attempt or of"
        ):
            wait_for_earlier(RunDirectory(tmp_path))
        monkeypatch.setattr(fence, "LEAVES_WITHIN_S", 30.0)
        wait_for_earlier(RunDirectory(tmp_path))
        assert lock_owner(RunDirectory(tmp_path)) is None
