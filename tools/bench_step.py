"""Trained tokens per second, time split and peak memory of a configuration, over a few real steps.

    python tools/bench_step.py yaml/demo_cpu.yaml [key.sub=value ...] [--steps 3] [--out bench.json]

Runs the configuration as `sdpo_megatron.train` does, in a run directory of its own that is removed afterwards, without
evaluation and without a checkpoint before the end. The first step warms up and is not counted.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from sdpo_megatron.files import output_file
from sdpo_megatron.stopping import run_until_stopped


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--steps", type=int, default=3, help="counted steps")
    parser.add_argument("--out", type=output_file, help="where to write the JSON besides showing it")
    options = parser.parse_intermixed_args()
    if options.steps < 1:
        parser.error(f"--steps is {options.steps}; it must be at least 1")
    directory = Path(tempfile.mkdtemp(prefix="bench-step-"))
    try:
        code = run_until_stopped(command(options, directory))
        if code != 0:
            return code
        rows = [json.loads(line) for line in (directory / "bench" / "metrics.jsonl").read_text().splitlines()]
    finally:
        shutil.rmtree(directory)
    text = json.dumps(summary(options, rows[1 : options.steps + 1]), indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    return 0


def command(options: argparse.Namespace, directory: Path) -> list[str]:
    steps = options.steps + 1
    fixed = [
        f"run.dir={directory}",
        "run.name=bench",
        f"run.steps={steps}",
        f"eval.every={steps}",
        "eval.problems=0",
        "eval.exact_problems=0",
        f"checkpoint.every={steps}",
    ]
    return [sys.executable, "-m", "sdpo_megatron.train", str(options.config), *options.overrides, *fixed]


def summary(options: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns medians over the counted steps; seconds, tokens, GiB."""

    def median(key: str) -> float:
        return round(statistics.median(row.get(key, 0.0) for row in rows), 3)

    phases = sorted({key for row in rows for key in row if key.startswith("time/")})
    return {
        "config": str(options.config),
        "overrides": options.overrides,
        "steps": len(rows),
        "trained_tokens_per_s": median("perf/trained_tokens_per_s"),
        "trained_tokens_per_step": median("perf/trained_tokens"),
        "response_tokens_per_step": median("perf/response_tokens"),
        "peak_memory_gib": round(max(row["memory/all_processes_gib"] for row in rows), 3),
        "seconds": {key.removeprefix("time/"): median(key) for key in phases},
    }


if __name__ == "__main__":
    sys.exit(main())
