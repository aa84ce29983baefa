"""Memory, cores, shared memory and open files, by stand-ins for machines that have less."""

import os
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest

from sdpo_megatron.config import RolloutSettings
from sdpo_megatron.doctor import limits as module
from sdpo_megatron.doctor.limits import cores, memory, open_files, shared_memory

GIB = 1 << 30


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A control group of these files, on a machine with 64 GiB, 32 of them free, and eight cores."""
    monkeypatch.setattr(module, "groups", lambda controller: [tmp_path])
    machine = SimpleNamespace(total=64 * GIB, available=32 * GIB)
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: machine)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(os, "cpu_count", lambda: 16)

    def make(**files: str) -> None:
        for name, text in files.items():
            (tmp_path / name.replace("__", ".")).write_text(text)

    return make


def test_memory_without_a_limit(group):
    (finding,) = memory()
    assert (finding.status, finding.found) == ("ok", "64.0 GiB, 32.0 GiB of it to be had")


def test_memory_within_a_control_group(group):
    limit = {"memory__current": "0", "memory__stat": "anon 0"}
    group(memory__max=str(24 * GIB), **limit)
    (finding,) = memory()
    assert finding.status == "ok"
    assert finding.found == "64.0 GiB, 24.0 GiB of it to be had; the control group's limit is 24.0 GiB"
    assert finding.figures == {"bytes": 64 * GIB, "bytes_available": 24 * GIB, "bytes_limit": 24 * GIB}
    group(memory__current=str(20 * GIB))
    (finding,) = memory()
    assert finding.status == "warning" and "4.0 GiB of it to be had" in finding.found
    assert "srun --mem" in finding.todo


def test_a_limit_of_version_1_is_seen(group):
    group(
        memory__limit_in_bytes=str(8 * GIB),
        memory__usage_in_bytes=str(3 * GIB),
        memory__stat="total_inactive_file 0",
    )
    assert "5.0 GiB of it to be had; the control group's limit is 8.0 GiB" in memory()[0].found


def test_cores_and_their_quota(group):
    assert (cores()[0].status, cores()[0].found) == ("ok", "8 of 16")
    group(cpu__max="800000 100000")
    assert cores()[0].status == "ok"
    group(cpu__max="250000 100000")
    (finding,) = cores()
    assert finding.status == "warning"
    assert finding.found == "8 of 16, but the control group gives the time of 2.5"
    assert finding.todo.startswith("set OMP_NUM_THREADS=2,") and finding.figures == {"cores": 2.5}
    group(cpu__max="50000 100000")
    assert "OMP_NUM_THREADS=1," in cores()[0].todo


def test_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "SHARED_MEMORY", tmp_path)
    usage = SimpleNamespace(total=64 << 20, free=64 << 20)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    (finding,) = shared_memory()
    assert finding.status == "warning" and "--shm-size" in finding.todo
    assert finding.found == f"{tmp_path} has 0.06 GiB, 0.06 GiB free"
    usage.free = GIB
    assert shared_memory()[0].status == "ok"
    monkeypatch.setattr(module, "SHARED_MEMORY", tmp_path / "none")
    assert shared_memory()[0].status == "failure"


@pytest.mark.parametrize(
    ("soft", "hard", "status", "found"),
    [
        (1024, 1280, "ok", "1024 may be open, and a run may raise that to 1280"),
        (1024, 1279, "failure", "1024 may be open, and a run may raise that to 1279"),
        (1024, resource.RLIM_INFINITY, "ok", "1024 may be open, and a run may raise that to any number"),
    ],
)
def test_open_files(soft, hard, status, found, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, hard))
    (finding,) = open_files(RolloutSettings())
    assert (finding.status, finding.found) == (status, found)
    if status == "failure":
        assert "rollout.max_concurrent_requests to at most 1023: 1024 take 1280 open files" in finding.todo
    assert open_files(RolloutSettings(max_concurrent_requests=1))[0].status == "ok"
