"""A run directory's file system, as it is and as it should not be."""

import errno
import fcntl
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from sdpo_megatron.doctor import run_directory as module
from sdpo_megatron.doctor.file_systems import FileSystem
from sdpo_megatron.doctor.run_directory import finds_canary, run_directory, write_canary

GIB = 1 << 30


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch):
    def give(size: int, kind: str = "ext4") -> None:
        monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=size))
        system = FileSystem(point="/", kind=kind, options=())
        monkeypatch.setattr(module, "file_system_of", lambda path: system)
        monkeypatch.setattr(module, "BLOCKS", 1)

    return give


def test_it_is_measured_and_nothing_is_left(tmp_path: Path, free):
    free(50 * GIB)
    kind, speed, files = run_directory(tmp_path / "runs/of/mine")
    assert {finding.status for finding in (kind, speed, files)} == {"ok"}
    assert kind.found == f"{tmp_path}/runs/of/mine is on ext4 at /, local, 50.0 GiB free"
    assert float(speed.figures["write_s"]) > 0 and float(speed.figures["read_s"]) > 0
    assert files.found.startswith("locks hold; a renamed file is seen; ")
    assert list(tmp_path.iterdir()) == []


def test_all_of_the_block_is_written_and_read(tmp_path: Path):
    module._transfer(tmp_path / "block")
    assert (tmp_path / "block").stat().st_size == 64 << 20


@pytest.mark.parametrize(
    ("size", "kind", "status", "todo"),
    [
        (GIB - 1, "ext4", "failure", "free space"),
        (9 * GIB, "ext4", "warning", "free space"),
        (50 * GIB, "tmpfs", "warning", "lost with the machine"),
        (50 * GIB, "nfs4", "ok", ""),
    ],
)
def test_too_little_space_and_what_does_not_last(size, kind, status, todo, tmp_path: Path, free):
    free(size, kind)
    finding = run_directory(tmp_path)[0]
    assert finding.status == status and todo in finding.todo
    assert finding.figures == {"kind": kind, "place": finding.figures["place"], "bytes_free": size}


@pytest.mark.parametrize("problem", [errno.EROFS, errno.ENOSPC])
def test_one_that_cannot_be_written(problem, tmp_path: Path, free, monkeypatch: pytest.MonkeyPatch):
    def refuses(path):
        raise OSError(problem, os.strerror(problem))

    free(50 * GIB)
    monkeypatch.setattr(module, "_transfer", refuses)
    (finding,) = run_directory(tmp_path)
    assert finding.status == "failure"
    assert finding.found == f"{tmp_path} (ext4 at /, local) cannot be written: {os.strerror(problem)}"
    assert "set run.dir" in finding.todo and list(tmp_path.iterdir()) == []


def test_one_that_is_a_file(tmp_path: Path):
    (tmp_path / "runs").touch()
    (finding,) = run_directory(tmp_path / "runs")
    assert finding.status == "failure" and "Not a directory" in finding.found


def test_a_slow_one(tmp_path: Path, free, monkeypatch: pytest.MonkeyPatch):
    free(50 * GIB)
    monkeypatch.setattr(module, "_transfer", lambda path: (0.05, 0.01))
    speed = run_directory(tmp_path)[1]
    assert speed.status == "warning" and speed.found.startswith(
        "20 MiB/s written and on the disk, 100 MiB/s read"
    )
    assert "checkpoint.every" in speed.todo
    monkeypatch.setattr(module, "SLOW_FILE_S", 0.0)
    assert [finding.status for finding in run_directory(tmp_path)[1:]] == ["warning", "warning"]


@pytest.mark.parametrize(
    ("second", "found"),
    [
        (None, "does not hold"),
        (OSError(errno.ENOLCK, "No locks available"), "is refused (No locks available)"),
    ],
)
def test_locks_that_do_nothing(second, found, tmp_path: Path, free, monkeypatch: pytest.MonkeyPatch):
    def flock(file, how):
        if second is not None:
            raise second

    free(50 * GIB)
    monkeypatch.setattr(fcntl, "flock", flock)
    files = run_directory(tmp_path)[2]
    assert files.status == "failure" and f"a lock (flock) {found}" in files.found and "nolock" in files.todo


def test_a_renamed_file_that_does_not_appear(tmp_path: Path, free, monkeypatch: pytest.MonkeyPatch):
    free(50 * GIB)
    monkeypatch.setattr(module, "finds_canary", lambda *arguments: False)
    files = run_directory(tmp_path)[2]
    assert files.status == "failure" and files.found == "a file that was renamed is not there after 5 s"


def test_a_canary_is_found_whole_and_by_name(tmp_path: Path):
    write_canary(tmp_path, "node1")
    assert not finds_canary(tmp_path, "node2", 0.0)
    (tmp_path / "canary-node2").touch()
    assert not finds_canary(tmp_path, "node2", 0.1)
    later = threading.Timer(0.2, write_canary, (tmp_path, "node2"))
    later.start()
    start = time.monotonic()
    assert finds_canary(tmp_path, "node2", 10.0)
    assert 0.1 < time.monotonic() - start < 10
    later.join()
