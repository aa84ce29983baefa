"""Checks and measures on a GPU everything of this project that a GPU runs; where there is none, the same in small.

    python tools/check_gpu.py [--minutes 8] [--json check_gpu.json] [--wheels DIR] [--parts correctness training]
    python tools/check_gpu.py --device cpu --minutes 2       the same on a CPU: Triton's interpreter, small sizes
    python tools/check_gpu.py --collect-wheels DIR           where there is a network, for a machine without one

In this order, each part in a process of its own:

    correctness   every objective against float64, value and gradient, at T 8,192 and V 151,936 and at odd sizes
    kernels       time and bytes per second of each Triton kernel beside a copy
    training      a step's gradients against a CPU's in float32; time of its parts, MFU and memory
    attention     token trees: scaled_dot_product_attention per block beside FlexAttention
    products      the matrix products between hidden states and loss beside a large one
    baselines     our losses beside eager PyTorch, torch.compile, Megatron and Liger, and beside the README's estimates

It needs torch 2.11 or newer with Triton, and for `training` and a part of `baselines` megatron-core, pydantic and
safetensors; what is missing is named, and what could not be run for it. No server, no model files, no data. The JSON is
complete after every part. Exit code 1: something is wrong. `tools/README.md` says how to read the table.
"""

import argparse
import hashlib
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sdpo_megatron.files import output_file, write_atomically
from tools.gpu_check.environment import Environment, missing
from tools.gpu_check.table import table
from tools.gpu_check.wheels import collect, install

ROOT = Path(__file__).resolve().parents[1]
PARTS = {
    "correctness": 0.4,
    "kernels": 0.25,
    "training": 0.5,
    "attention": 0.4,
    "products": 0.25,
    "baselines": 1.0,
}
"""The share of all time that each part may take at most."""
RECORDED = ("torch", "triton", "megatron-core", "transformers", "numpy", "pydantic", "safetensors", "liger-kernel",
            "transformer-engine", "flash-attn")  # fmt: skip


@dataclass
class Part:
    name: str
    status: str = "not reached"
    """passed, failed, stopped (its time was over: the rows so far count), skipped, not reached"""
    reason: str = ""
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    log: str = ""
    """The end of what a part that did not pass has printed."""


def main() -> int:
    options = parse()
    if options.collect_wheels:
        return collect(options.collect_wheels)
    with tempfile.TemporaryDirectory(prefix="check-gpu-") as directory:
        site = Path(directory) / "site"
        if options.wheels:
            install(options.wheels, site)
        environment = Environment.of(options.device, ROOT, site, Path(directory))
        if options.record:
            ended = environment.run("record", timeout_s=None)
            sys.exit(ended.last_words if ended.code else 0)
        return check(options, environment)


def check(options: argparse.Namespace, environment: Environment) -> int:
    started, budget = time.monotonic(), 60 * options.minutes
    report = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": environment.description,
        "versions": versions(),
        "commit": options.commit or commit(),
        "source": source(),
        "minutes": options.minutes,
    }
    print(f"{environment.description['device']}, commit {report['commit']}", flush=True)
    parts = [Part(name) for name in PARTS if name in options.parts]
    for part in parts:
        left = budget - (time.monotonic() - started)
        run_part(part, environment, min(left, PARTS[part.name] * budget))
        print(table(part.name, part.status, part.reason, part.seconds, part.rows), flush=True)
        write_atomically(
            options.json, json.dumps({**report, "parts": [asdict(p) for p in parts]}, indent=1) + "\n"
        )
    for part in parts:
        print(f"{part.name}: {part.status}{f' ({part.reason})' if part.reason else ''}")
    return int(any(part.status == "failed" for part in parts))


def run_part(part: Part, environment: Environment, seconds: float) -> None:
    lacking = missing(part.name)
    if lacking:
        part.status, part.reason = "skipped", f"{', '.join(lacking)}: install, or give --wheels"
        return
    if seconds < 5:
        part.reason = "the time was over"
        return
    ended = environment.run(part.name, timeout_s=seconds)
    part.rows, part.seconds = ended.rows, round(ended.seconds, 1)
    wrong = [row["what"] for row in part.rows if row.get("ok") is False]
    if wrong:
        part.status, part.reason = "failed", f"{len(wrong)} of {len(part.rows)}, first: {wrong[0]}"
    elif ended.code is None:
        part.status, part.reason = "stopped", f"after {ended.seconds:.0f} s; the rows so far count"
    elif ended.code:
        part.status, part.reason = "failed", ended.last_words
    else:
        part.status = "passed"
    part.log = ended.log if part.status != "passed" else ""


def versions() -> dict[str, str]:
    found = {name: importlib.metadata.distributions(name=name) for name in RECORDED}
    known = {name: next(iter(distributions), None) for name, distributions in found.items()}
    return {"python": sys.version.split()[0]} | {
        name: distribution.version if distribution else "not installed"
        for name, distribution in known.items()
    }


def commit() -> str:
    """Returns the commit of the checkout, with `+changes` where it differs; `unknown` where this is none."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def source() -> str:
    """Returns the SHA-256 of the package's and the check's files, which tells which code ran where no commit is
    known."""
    files = sorted([*ROOT.glob("sdpo_megatron/**/*.py"), *ROOT.glob("tools/**/*.py")])
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                        help="auto: the GPU that torch sees, else the CPU")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=8, help="when to stop (8)")
    parser.add_argument("--json", type=output_file, default=Path("check_gpu.json"), metavar="FILE",
                        help="where to write everything (check_gpu.json)")  # fmt: skip
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                        help=f"all unless given: {', '.join(PARTS)}")  # fmt: skip
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="to install from, for this check alone")
    parser.add_argument("--collect-wheels", type=Path, metavar="DIR",
                        help="put into DIR what a machine with torch, triton, numpy and safetensors lacks")  # fmt: skip
    parser.add_argument("--commit", help="to note where this is no git checkout")
    parser.add_argument("--record", action="store_true",
                        help="write tools/gpu_check/recording.json again, on this CPU")  # fmt: skip
    options = parser.parse_args()
    if not options.minutes > 0:
        parser.error(f"--minutes is {options.minutes:g}; it must be above 0")
    if options.record:
        options.device = "cpu"
    return options


if __name__ == "__main__":
    raise SystemExit(main())
