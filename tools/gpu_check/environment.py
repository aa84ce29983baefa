"""The processes that the parts run in: one each, so that a part that crashes or hangs takes no other with it."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NEEDS = {
    "training": ("megatron.core", "pydantic", "safetensors"),
    "attention": ("numpy",),
}
"""What a part needs besides torch and triton, which every part needs. `baselines` leaves out the implementations that
lack something."""
NAMES = {"megatron.core": "megatron-core"}


def missing(part: str) -> list[str]:
    """Returns what `part` needs and cannot be imported, as pip calls it."""
    needed = ("torch", "triton", *NEEDS.get(part, ()))
    return [NAMES.get(name, name) for name in needed if not _is_there(name)]


def _is_there(module: str) -> bool:
    top = module.partition(".")[0]
    return importlib.util.find_spec(top) is not None and importlib.util.find_spec(module) is not None


@dataclass
class Ended:
    code: int | None
    """The exit code; None: it was stopped because its time was over."""
    seconds: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    last_words: str = ""
    log: str = ""
    """The end of what it printed, tracebacks included."""


@dataclass(frozen=True)
class Environment:
    device: str
    root: Path
    site: Path
    directory: Path
    description: dict[str, Any]

    @classmethod
    def of(cls, device: str, root: Path, site: Path, directory: Path) -> "Environment":
        """Asks a process which device that is; ends the command in one line where there is none."""
        if lacking := missing(""):
            sys.exit(f"error: {', '.join(lacking)} not installed; use a Python with torch 2.11 and Triton.")
        ended = cls(device, root, site, directory, {}).run("describe", timeout_s=120)
        if ended.code or not ended.rows:
            sys.exit(f"error: no device for --device {device}: {ended.last_words or 'torch did not answer'}")
        (description,) = ended.rows
        return cls(description.pop("type"), root, site, directory, description)

    def run(self, part: str, *, timeout_s: float | None) -> Ended:
        rows, log = self.directory / f"{part}.jsonl", self.directory / f"{part}.log"
        start = time.monotonic()
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "tools.gpu_check", part, self.device, str(rows)],
                cwd=self.root,
                env=self._variables(),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _kill(process)
        text = log.read_text(errors="replace").strip()
        whole = [line for line in (rows.read_text() if rows.exists() else "").split("\n")[:-1]]
        return Ended(
            code,
            time.monotonic() - start,
            [json.loads(line) for line in whole],
            text.rpartition("\n")[2],
            text[-8000:],
        )

    def _variables(self) -> dict[str, str]:
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(self.site), str(self.root)])}
        # one rank needs no network, and such a machine's name may not resolve
        variables |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
        if self.device == "cpu":
            # Triton decides at its import; threads that wait for each other cost more than they help
            variables |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return variables


def _kill(process: subprocess.Popen) -> None:
    """Kills the process with all that it has started: compilers have workers."""
    try:
        os.killpg(process.pid, 9)
    except ProcessLookupError:
        # all of them have ended
        pass
    process.wait()
