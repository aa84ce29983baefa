"""What this process may have of the machine: memory, cores, shared memory, open files."""

import os
import resource
import shutil
from pathlib import Path

import psutil

from sdpo_megatron.config import RolloutSettings
from sdpo_megatron.doctor.findings import Finding, failure, ok, warning
from sdpo_megatron.preflight.cgroups import cpu_quota, groups, memory_left, memory_limit
from sdpo_megatron.preflight.open_files import BESIDE_REQUESTS

SHARED_MEMORY = Path("/dev/shm")
GIB = 1 << 30
LITTLE_MEMORY, LITTLE_SHARED_MEMORY = 6 * GIB, GIB
"""The demo needs about the first; libraries that pass tensors between processes, the second."""


def memory() -> list[Finding]:
    machine = psutil.virtual_memory()
    limits = [limit for group in groups("memory") if (limit := memory_limit(group)) is not None]
    left = [left for group in groups("memory") if (left := memory_left(group)) is not None]
    available = min([machine.available, *left])
    found = f"{machine.total / GIB:.1f} GiB, {available / GIB:.1f} GiB of it to be had"
    limit = min(limits, default=machine.total)
    if limit < machine.total:
        found += f"; the control group's limit is {limit / GIB:.1f} GiB"
    figures = {"bytes": machine.total, "bytes_available": available, "bytes_limit": limit}
    if available < LITTLE_MEMORY:
        todo = "end other programs, or ask for more (srun --mem): the demo needs about 6 GiB"
        return [warning("memory", found, todo, **figures)]
    return [ok("memory", found, **figures)]


def shared_memory() -> list[Finding]:
    name = "shared memory"
    todo = "enlarge it (docker run --shm-size=16g, or --ipc=host): NCCL and SGLang pass tensors through it"
    if not SHARED_MEMORY.is_dir() or not os.access(SHARED_MEMORY, os.W_OK):
        return [failure(name, f"{SHARED_MEMORY} is not there, or cannot be written", todo)]
    usage = shutil.disk_usage(SHARED_MEMORY)
    found = f"{SHARED_MEMORY} has {usage.total / GIB:.2f} GiB, {usage.free / GIB:.2f} GiB free"
    if usage.free < LITTLE_SHARED_MEMORY:
        return [warning(name, found, todo, bytes=usage.total, bytes_free=usage.free)]
    return [ok(name, found, bytes=usage.total, bytes_free=usage.free)]


def cores() -> list[Finding]:
    allowed, there = len(os.sched_getaffinity(0)), os.cpu_count() or 0
    quota = min((quota for group in groups("cpu") if (quota := cpu_quota(group)) is not None), default=None)
    found = f"{allowed} of {there}"
    if quota is None or quota >= allowed:
        return [ok("cores", found, cores=allowed)]
    threads = max(1, int(quota))
    todo = f"set OMP_NUM_THREADS={threads}, or ask for more (docker run --cpus): more threads than that only wait"
    return [
        warning("cores", f"{found}, but the control group gives the time of {quota:.3g}", todo, cores=quota)
    ]


def open_files(rollout: RolloutSettings) -> list[Finding]:
    """Looks at the hard limit: a run raises its own as far as that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = rollout.max_concurrent_requests + BESIDE_REQUESTS
    found = f"{soft} may be open, and a run may raise that to {'any number' if hard < 0 else hard}"
    if 0 <= hard < needed:
        todo = (
            f"raise that limit (ulimit -Hn), or set rollout.max_concurrent_requests to at most "
            f"{max(1, hard - BESIDE_REQUESTS)}: {rollout.max_concurrent_requests} take {needed} open files"
        )
        return [failure("open files", found, todo, open_files=hard)]
    return [ok("open files", found, open_files=hard)]
