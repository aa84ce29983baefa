"""GPUs, their driver, and whether torch can use them."""

import ctypes
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sdpo_megatron.doctor.findings import Finding, failure, ok, warning
from sdpo_megatron.preflight.checked import CUDA_DRIVER

NAME = "GPU"
DRIVER = Path("/proc/driver/nvidia")
MOSTLY_FREE = 0.9
GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Driver:
    version: str
    """The kernel module's; empty where there is none."""
    cuda: str
    """The newest CUDA that it runs; empty where its library is not there."""
    gpus: int
    """What the kernel module counts, whatever torch may see."""


def driver() -> Driver:
    version, cuda = "", ""
    if (DRIVER / "version").is_file():
        found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", (DRIVER / "version").read_text())
        version = found[1] if found else "of an unknown version"
    try:
        number = ctypes.c_int()
        if ctypes.CDLL(CUDA_DRIVER).cuDriverGetVersion(ctypes.byref(number)) == 0:
            cuda = f"{number.value // 1000}.{number.value % 1000 // 10}"
    # no library: no GPU for us
    except OSError:
        pass
    gpus = len(list((DRIVER / "gpus").iterdir())) if (DRIVER / "gpus").is_dir() else 0
    return Driver(version=version, cuda=cuda, gpus=gpus)


def device_here(wanted: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """Returns what `run.device` comes to here, as far as it can be told without torch."""
    if wanted != "auto":
        return wanted
    return "cuda" if driver().cuda else "cpu"


def gpus(wanted: Literal["auto", "cpu", "cuda"]) -> list[Finding]:
    """A machine without any is fine unless `run.device` wants one."""
    its = driver()
    if not its.version and not its.cuda:
        if wanted == "cuda":
            todo = "run on a machine with a GPU (srun --gpus), or set run.device=cpu"
            return [failure(NAME, "none, but run.device is cuda", todo)]
        return [ok(NAME, "none: runs on the CPU", gpus=0)]
    said = f"driver {its.version or 'without a kernel module'}, CUDA {its.cuda or 'without its library'}"
    try:
        import torch
    # whatever a broken installation raises
    except Exception as error:
        todo = "mend the trainer's environment first"
        return [failure(NAME, f"{said}; torch cannot be imported ({type(error).__name__}: {error})", todo)]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return [_none_seen(torch, its, said, wanted)]
    return [ok(NAME, f"{count}; {said}; torch is built for CUDA {torch.version.cuda}", gpus=count)] + [
        _one(torch, number) for number in range(count)
    ]


def _none_seen(torch: Any, its: Driver, said: str, wanted: str) -> Finding:
    found = f"torch sees none of the driver's {its.gpus}; {said}"
    if torch.version.cuda is None:
        todo = "install torch's CUDA build into the trainer's environment (pip install torch, from PyPI)"
        found += "; torch is built for CPUs alone"
    elif (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        todo = "ask for GPUs (srun --gpus), or take CUDA_VISIBLE_DEVICES out of the environment"
        found += f"; CUDA_VISIBLE_DEVICES is {visible!r}"
    else:
        todo = "see whether nvidia-smi lists them (in a container: --gpus all or --nv); newer CUDA needs a newer driver"
        found += f"; torch is built for CUDA {torch.version.cuda}"
    if wanted == "cuda":
        return failure(NAME, found, todo, gpus=0)
    return warning(NAME, f"{found}; a run would take the CPU", todo, gpus=0)


def _one(torch: Any, number: int) -> Finding:
    name = f"GPU {number}"
    try:
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        found = f"{properties.name}, {total / GIB:.1f} GiB, {free / GIB:.1f} GiB free"
        sums = torch.ones(1024, device=f"cuda:{number}").sum().item()
    # a GPU that has fallen off its bus, or is another's alone
    except RuntimeError as error:
        todo = "see nvidia-smi: another program has it, or it needs a reset"
        return failure(name, f"cannot be used: {str(error).splitlines()[0]}", todo)
    if sums != 1024:
        todo = "take this machine out of use: the GPU computes wrongly"
        return failure(name, f"{found}; it adds 1024 ones to {sums:g}", todo)
    figures = {"bytes": total, "bytes_free": free}
    if free < MOSTLY_FREE * total:
        todo = "end what else runs on it (nvidia-smi shows that), or take another with CUDA_VISIBLE_DEVICES"
        return warning(name, found, todo, **figures)
    return ok(name, found, **figures)
