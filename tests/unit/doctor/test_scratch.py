"""Scratch and caches, on file systems that this machine has not."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from sdpo_megatron.doctor import scratch as module
from sdpo_megatron.doctor.file_systems import FileSystem
from sdpo_megatron.doctor.scratch import cache_directories, caches, scratch

GIB = 1 << 30


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch):
    def give(kind: str, *options: str, free: int = 50 * GIB) -> None:
        system = FileSystem(point="/x", kind=kind, options=options)
        monkeypatch.setattr(module, "file_system_of", lambda path: system)
        monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))

    return give


def test_which_directory_is_scratch(tmp_path: Path, on):
    on("xfs")
    both = {"SLURM_TMPDIR": str(tmp_path), "TMPDIR": "/elsewhere"}
    (finding,) = scratch(both)
    assert finding.status == "ok"
    assert finding.found == f"{tmp_path} ($SLURM_TMPDIR) is on xfs at /x, local, 50.0 GiB free"
    assert list(tmp_path.iterdir()) == []
    assert f"{tmp_path} ($TMPDIR)" in scratch({"TMPDIR": str(tmp_path), "SLURM_TMPDIR": ""})[0].found
    assert scratch({})[0].found.startswith("/tmp is on")


def test_scratch_that_is_of_no_use(tmp_path: Path, on):
    on("nfs4")
    assert scratch({"TMPDIR": str(tmp_path)})[0].status == "warning"
    on("xfs", free=GIB)
    (finding,) = scratch({"TMPDIR": str(tmp_path)})
    assert finding.status == "warning" and "free space there" in finding.todo
    (finding,) = scratch({"TMPDIR": str(tmp_path / "none")})
    assert finding.status == "failure" and "cannot be written: No such file or directory" in finding.found


def test_caches_are_where_their_libraries_have_them(monkeypatch: pytest.MonkeyPatch):
    """Asked of the libraries themselves, where they can be asked without a GPU."""
    from huggingface_hub import constants
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir
    from triton.knobs import cache

    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    found = {name: path for name, (path, _) in cache_directories(os.environ).items()}
    assert str(found["Triton"]) == cache.dir
    assert str(found["Hugging Face"]) == constants.HF_HUB_CACHE
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        assert str(found["Inductor"]) == default_cache_dir()


def test_variables_move_caches():
    moved = cache_directories(
        {
            "HOME": "/home/me",
            "XDG_CACHE_HOME": "/cache",
            "TMPDIR": "/scratch",
            "TRITON_CACHE_DIR": "/t",
            "SGLANG_CACHE_DIR": "/s",
        }
    )
    assert [str(path) for path, _ in moved.values()] == [
        "/t",
        f"/scratch/torchinductor_{module._user()}",
        "/s",
        "/cache/huggingface/hub",
    ]
    more = cache_directories(
        {"HOME": "/h", "HF_HOME": "/hf", "TRITON_HOME": "/th", "TORCHINDUCTOR_CACHE_DIR": "/i"}
    )
    assert [str(path) for path, _ in more.values()] == [
        "/th/.triton/cache",
        "/i",
        "/h/.cache/sglang",
        "/hf/hub",
    ]


def test_a_user_without_a_name(monkeypatch: pytest.MonkeyPatch):
    def nameless():
        raise KeyError("getpwuid(): uid not found: 4711")

    monkeypatch.setattr(module.getpass, "getuser", nameless)
    assert module._user() == f"uid_{os.getuid()}"


def test_a_cache_on_a_network_file_system_is_warned_of(on, tmp_path: Path):
    environment = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    on("nfs4")
    found = caches(environment)
    assert [finding.status for finding in found] == ["warning"] * 4
    assert found[0].name == "cache of Triton" and "TRITON_CACHE_DIR" in found[0].todo
    assert "model.path" in found[3].todo
    on("ext4", "rw")
    assert [finding.status for finding in caches(environment)] == ["ok"] * 4
    on("ext4", "rw", "noexec")
    assert [finding.status for finding in caches(environment)] == ["warning"] * 3 + ["ok"]
    assert "mounted noexec" in caches(environment)[0].found


def test_a_cache_that_cannot_be_written(on, monkeypatch: pytest.MonkeyPatch):
    on("ext4")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert all(finding.found.endswith("and cannot be written") for finding in caches({"HOME": "/home/me"}))
