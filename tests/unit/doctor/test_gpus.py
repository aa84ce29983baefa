"""GPUs by stand-ins for the driver's files and for torch: what a machine without one cannot show."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sdpo_megatron.doctor import gpus as module
from sdpo_megatron.doctor.gpus import Driver, device_here, driver, gpus

GIB = 1 << 30
VERSION = """\
NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024
GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)
"""
OPEN_VERSION = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build  (a@b)\n"


class Cuda:
    """Two GPUs with free memory as given."""

    def __init__(self, *free: int) -> None:
        self.free = free

    def is_available(self) -> bool:
        return bool(self.free)

    def device_count(self) -> int:
        return len(self.free)

    def get_device_properties(self, number: int) -> SimpleNamespace:
        if self.free[number] < 0:
            raise RuntimeError("CUDA error: all CUDA-capable devices are busy\nCUDA kernel errors might be")
        return SimpleNamespace(name="NVIDIA H100")

    def mem_get_info(self, number: int) -> tuple[int, int]:
        return self.free[number], 80 * GIB


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    def make(*free: int, built: str | None = "13.0", sums: float = 1024.0) -> None:
        ones = SimpleNamespace(sum=lambda: SimpleNamespace(item=lambda: sums))
        torch = SimpleNamespace(
            cuda=Cuda(*free), version=SimpleNamespace(cuda=built), ones=lambda count, device: ones
        )
        monkeypatch.setitem(sys.modules, "torch", torch)
        monkeypatch.setattr(module, "driver", lambda: Driver(version="550.54.15", cuda="12.4", gpus=2))

    return make


def test_the_drivers_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "DRIVER", tmp_path)
    monkeypatch.setattr(module, "CUDA_DRIVER", "no-such-library.so")
    assert driver() == Driver(version="", cuda="", gpus=0)
    (tmp_path / "version").write_text(VERSION)
    (tmp_path / "gpus/0000:18:00.0").mkdir(parents=True)
    assert driver() == Driver(version="550.54.15", cuda="", gpus=1)
    (tmp_path / "version").write_text(OPEN_VERSION)
    assert driver().version == "580.82.07"


def test_no_gpu_is_fine_unless_one_is_wanted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "driver", lambda: Driver(version="", cuda="", gpus=0))
    monkeypatch.setitem(sys.modules, "torch", None)
    for wanted in ("auto", "cpu"):
        (finding,) = gpus(wanted)
        assert (finding.status, finding.found) == ("ok", "none: runs on the CPU")
    (finding,) = gpus("cuda")
    assert (finding.status, finding.found) == ("failure", "none, but run.device is cuda")
    assert device_here("auto") == "cpu" and device_here("cuda") == "cuda"


def test_each_gpu_has_a_line(machine):
    machine(79 * GIB, 20 * GIB, -1)
    whole, free, used, gone = gpus("auto")
    assert whole.found == "3; driver 550.54.15, CUDA 12.4; torch is built for CUDA 13.0"
    assert (free.name, free.status, free.found) == ("GPU 0", "ok", "NVIDIA H100, 80.0 GiB, 79.0 GiB free")
    assert free.figures == {"bytes": 80 * GIB, "bytes_free": 79 * GIB}
    assert used.status == "warning" and "nvidia-smi" in used.todo
    assert gone.status == "failure"
    assert gone.found == "cannot be used: CUDA error: all CUDA-capable devices are busy"
    assert device_here("auto") == "cuda"


def test_one_that_computes_wrongly_is_taken_out_of_use(machine):
    machine(79 * GIB, sums=1023.0)
    assert gpus("auto")[1].status == "failure" and "adds 1024 ones to 1023" in gpus("auto")[1].found


@pytest.mark.parametrize(
    ("built", "environment", "found", "todo"),
    [
        (None, {}, "built for CPUs alone", "install torch's CUDA build"),
        ("13.0", {"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES is ''", "srun --gpus"),
        ("13.0", {}, "torch is built for CUDA 13.0", "newer CUDA needs a newer driver"),
    ],
)
def test_gpus_that_torch_does_not_see(
    built, environment, found, todo, machine, monkeypatch: pytest.MonkeyPatch
):
    machine(built=built)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (finding,) = gpus("auto")
    assert finding.status == "warning" and found in finding.found and todo in finding.todo
    assert "torch sees none of the driver's 2" in finding.found
    assert gpus("cuda")[0].status == "failure"


def test_a_torch_that_cannot_be_imported_is_a_finding(machine, monkeypatch: pytest.MonkeyPatch):
    machine()
    monkeypatch.setitem(sys.modules, "torch", None)
    (finding,) = gpus("auto")
    assert finding.status == "failure" and "torch cannot be imported (ModuleNotFoundError" in finding.found
