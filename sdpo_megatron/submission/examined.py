"""The newest examination of each partition, in the user's cache; and the offer of one where there is none."""

import re
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import platformdirs

from sdpo_megatron.doctor.findings import Finding
from sdpo_megatron.errors import RunFailed
from sdpo_megatron.files import write_atomically
from sdpo_megatron.job.slurm import run_command
from sdpo_megatron.terminal import script


def report_of(partition: str | None) -> Path:
    """Returns the file for a partition of this cluster, None for the default one."""
    name = re.sub(r"[^\w.+-]+", "-", "_".join([cluster_name(), partition or "default"]))
    return platformdirs.user_cache_path("sdpo_megatron") / "doctor" / f"{name}.json"


def cluster_name() -> str:
    """Returns what Slurm calls the cluster; "cluster" where it does not say."""
    try:
        said = run_command(["scontrol", "show", "config"])
    except RunFailed:
        return "cluster"
    found = re.search(r"^ClusterName\s*=\s*(\S+)", said, re.MULTILINE)
    return found[1] if found else "cluster"


def write_report(partition: str | None, findings: Sequence[Finding]) -> Path:
    """Keeps what was found in the place of what was before; returns the file. Raises OSError."""
    path = report_of(partition)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, msgspec.json.encode({"time": time.time(), "findings": list(findings)}).decode())
    return path


def offer(partition: str | None, arguments: Sequence[str]) -> str:
    """Returns a line about a partition that was not examined yet, else nothing; `arguments` are files and overrides of
    hardware."""
    if report_of(partition).is_file():
        return ""
    command = script("slurm/doctor.py", *arguments)
    return f"This partition has not been examined yet: {command} (two minutes)"
