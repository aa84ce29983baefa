"""An all-reduce over two ranks on this machine, or one rank of several machines."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from sdpo_megatron.doctor.asking import Answer, answer_of, end, started
from sdpo_megatron.doctor.findings import Finding, failure, ok, warning
from sdpo_megatron.preflight.checked import count_gpus

RING_RANK = Path(__file__).with_name("ring_rank.py")
RANKS = 2
SLOW_S = 0.1
"""For one number, whose median is well below a millisecond where each rank has a core."""
POLL_S, LAST_WORDS_S = 0.05, 1.0
OF_A_RANK = {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
"""The directory of its script holds modules of any name."""
ON_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
GLOO_TODO = "see the lines on ports and on the trainer's environment: ranks on one machine talk over loopback"
NCCL_TODO = "run again with NCCL_DEBUG=INFO in the environment; see shared memory, and nvidia-smi topo -m"

BETWEEN_TODO = (
    "see the lines on names and links between nodes; where a node has several networks, export "
    "{library}_SOCKET_IFNAME in hardware.setup with one that all nodes have (ip -brief address)"
)
LIBRARY_MARGIN_S = 10.0
"""For their import, too."""


def gloo_ring(limit_s: float) -> list[Finding]:
    return [ring("gloo", ["cpu"] * RANKS, limit_s, GLOO_TODO)]


def nccl_ring(limit_s: float) -> list[Finding]:
    """Of as many ranks as there are GPUs, up to two: NCCL takes one rank on each."""
    gpus = count_gpus()
    if not gpus:
        return []
    return [ring("nccl", [f"cuda:{number}" for number in range(min(RANKS, gpus))], limit_s, NCCL_TODO)]


def ring(
    backend: str, devices: Sequence[str], limit_s: float, todo: str, python: str = sys.executable
) -> Finding:
    """Adds up over a rank for each device."""
    name = f"{backend} ring"
    answers = _answers(python, backend, devices, limit_s)
    wrong = [
        f"rank {rank} of {len(devices)} {problem}"
        for rank, answer in enumerate(answers)
        if (problem := _problem(answer))
    ]
    if wrong:
        return failure(name, "; ".join(wrong), todo)
    return _took(name, f"{len(devices)} ranks on this machine", answers[0])


def ring_between(
    backend: str,
    device: str,
    hosts: Sequence[str],
    number: int,
    port: int,
    limit_s: float,
    python: str = sys.executable,
) -> list[Finding]:
    """Adds up over a rank on each of `hosts`, which all call this; `number` is this one's among them, and `port` one of
    the first's. Returns what was measured on the first, and on the others only what is wrong."""
    name = f"{backend} ring between nodes"
    meeting = f"tcp://{hosts[0]}:{port}"
    # the libraries' own limit comes first, and they say more
    last = [meeting, str(number), str(len(hosts)), str(max(1.0, limit_s - LIBRARY_MARGIN_S))]
    environment = {**os.environ, **OF_A_RANK}
    answer = answer_of(started([python, str(RING_RANK), backend, device, *last], environment), limit_s)
    if problem := _problem(answer):
        todo = BETWEEN_TODO.format(library="GLOO" if backend == "gloo" else "NCCL")
        return [failure(name, f"rank {number} of {len(hosts)} {problem}", todo)]
    return [_took(name, f"{len(hosts)} nodes", answer)] if number == 0 else []


def _took(name: str, what: str, answer: Answer) -> Finding:
    figures = json.loads(answer.output.splitlines()[-1])
    small_s, size = figures["small_s"], figures["large_bytes"] / 2**20
    found = (
        f"{what}: {small_s * 1000:.3g} ms for one number, "
        f"{size / figures['large_s']:.0f} MiB/s for {size:.0f} MiB"
    )
    if small_s > SLOW_S:
        busy = "see what else runs here (top): ranks wait for each other hundreds of times a step"
        return warning(name, found, busy, **figures)
    return ok(name, found, **figures)


def _problem(answer: Answer) -> str:
    if answer.exit_code is None:
        return "is not done in time"
    return f"ends: {answer.last_error or f'exit code {answer.exit_code}'}" if answer.exit_code else ""


def _answers(python: str, backend: str, devices: Sequence[str], limit_s: float) -> list[Answer]:
    """Returns what the ranks say, once all are gone: those that one leaves alone are not waited for."""
    environment = {**os.environ, **ON_LOOPBACK, **OF_A_RANK}
    with tempfile.TemporaryDirectory(prefix="doctor-ring-") as own:
        ranks: list[subprocess.Popen[str]] = []
        try:
            for rank, device in enumerate(devices):
                last = [f"file://{own}/meeting", str(rank), str(len(devices)), str(limit_s)]
                ranks.append(started([python, str(RING_RANK), backend, device, *last], environment))
            deadline = time.monotonic() + limit_s
            while time.monotonic() < deadline:
                codes = [rank.poll() for rank in ranks]
                if any(codes) or None not in codes:
                    break
                time.sleep(POLL_S)
            return [answer_of(rank, LAST_WORDS_S) for rank in ranks]
        finally:
            for rank in ranks:
                end(rank)
