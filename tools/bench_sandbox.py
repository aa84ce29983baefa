"""What a sandbox costs: programs per second, latency, and overhead over a plain process, by backend.

    .venv/bin/python tools/bench_sandbox.py [--backends bubblewrap,sandlock] [--programs 200] [--json FILE]

A program is one test: Python starts, reads a number from its standard input and prints another. *Latency* is the median
of programs one after another, *overhead* what it exceeds that of the same program as a plain process by, measured in
turns with it. *Programs per second* is with as many at a time as there are cores.
"""

import argparse
import json
import os
import statistics
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sdpo_megatron.envs.sandbox.base import Limits, Program, Sandbox
from sdpo_megatron.envs.sandbox.choice import choose
from sdpo_megatron.envs.sandbox.settings import SandboxSettings
from sdpo_megatron.errors import UserError
from sdpo_megatron.files import output_file

ARGUMENTS = ["-I", "-S", "program.py"]
CODE, INPUT, ANSWER = b"print(int(input()) * 2)\n", b"21\n", b"42\n"
LIMITS = Limits(cpu_s=6, wall_s=60)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backends", default="bubblewrap,sandlock,unsafe_subprocess", help="names, by comma")
    parser.add_argument("--url", help="of a service, for the backend http")
    parser.add_argument("--programs", type=int, default=200, help="of each measurement")
    parser.add_argument("--json", type=output_file, help="where to write the figures besides showing them")
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    figures: dict[str, dict[str, Any]] = {}
    for name in options.backends.split(","):
        url = options.url if name == "http" else None
        try:
            sandbox, line = choose(SandboxSettings.model_validate({"backend": name, "url": url}))
        except (UserError, ValueError) as error:
            parser.error(str(error))
        print(line, flush=True)
        figures[name] = measure(sandbox, options.programs, cores)
    print(f"\n{cores} cores, {options.programs} programs each\n\n{table(figures)}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def measure(sandbox: Sandbox, programs: int, cores: int) -> dict[str, float]:
    """Returns seconds and rates of one sandbox."""
    latencies_s, plain_s = [], []
    for _ in range(programs):
        plain_s.append(plain(sandbox.python))
        latencies_s.append(confined(sandbox))
    began = time.perf_counter()
    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(confined, [sandbox] * programs))
    rate = programs / (time.perf_counter() - began)
    latency_s, alone_s = statistics.median(latencies_s), statistics.median(plain_s)
    return {
        "programs_per_s": rate,
        "programs_per_s_and_core": rate / cores,
        "latency_ms": latency_s * 1e3,
        "latency_p95_ms": statistics.quantiles(latencies_s, n=20)[-1] * 1e3,
        "plain_ms": alone_s * 1e3,
        "overhead_ms": (latency_s - alone_s) * 1e3,
    }


def confined(sandbox: Sandbox) -> float:
    began = time.perf_counter()
    outcome = sandbox.run(Program(["python", *ARGUMENTS], {ARGUMENTS[-1]: CODE}, INPUT), LIMITS)
    assert outcome.stdout_bytes == ANSWER, outcome
    return time.perf_counter() - began


def plain(python: str) -> float:
    # a service's own interpreter is not here
    python = python if Path(python).is_absolute() else "/usr/bin/python3"
    command = [python, *ARGUMENTS[:2], "-c", CODE.decode()]
    began = time.perf_counter()
    done = subprocess.run(command, input=INPUT, capture_output=True, env={}, check=True)
    assert done.stdout == ANSWER
    return time.perf_counter() - began


def table(figures: dict[str, dict[str, float]]) -> str:
    rows = [
        "| backend | programs/s | per core | latency ms (p95) | plain process ms | overhead ms |",
        "|---|---|---|---|---|---|",
    ]
    for name, of in figures.items():
        latency = f"{of['latency_ms']:.1f} ({of['latency_p95_ms']:.1f})"
        rate = f"{of['programs_per_s']:.0f} | {of['programs_per_s_and_core']:.0f}"
        rows.append(f"| {name} | {rate} | {latency} | {of['plain_ms']:.1f} | {of['overhead_ms']:.1f} |")
    return "\n".join(rows)


if __name__ == "__main__":
    raise SystemExit(main())
