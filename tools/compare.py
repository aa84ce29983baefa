"""Held-out accuracy of several settings under several seeds, by step and by minute.

    python tools/compare.py yaml/demo_cpu.yaml --out yaml/results/demo_cpu --seeds 0 1 2 \
        --variant sdpo loss.name=divergence --variant grpo loss.name=grpo

Makes one run after another and keeps the result of each as a JSON file in --out; its checkpoints, several GB, are then
removed. The same command after an interruption goes on where it was: results that are there are not made again, and a
run that was stopped continues from its checkpoint in --runs. At the end it prints the tables; without --variant it only
prints them.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sdpo_megatron.config import load_config
from sdpo_megatron.errors import UserError
from sdpo_megatron.evaluation.curves import (
    ACCURACY,
    NOT_LEARNING,
    Curve,
    Point,
    learning_seconds,
    read_curve,
)
from sdpo_megatron.evaluation.measures import EXACT
from sdpo_megatron.evaluation.ruler import check_same_ruler
from sdpo_megatron.run_dir.evaluations_file import HELD_OUT
from sdpo_megatron.run_dir.metrics_file import read_rows
from sdpo_megatron.stopping import run_until_stopped


class Job(NamedTuple):
    variant: str
    overrides: tuple[str, ...]
    seed: int

    @property
    def name(self) -> str:
        return f"{self.variant}_seed{self.seed}"


def main() -> int:
    options = parse()
    jobs = [
        Job(variant[0], tuple(variant[1:]), seed) for seed in options.seeds for variant in options.variant
    ]
    try:
        for job in jobs:
            load_config([options.config], job.overrides)
    except UserError as error:
        print(f"error: the variant {job.variant}: {error}", file=sys.stderr)
        return 2
    for job in jobs:
        result = options.out / f"{job.name}.json"
        if not result.is_file():
            code = run(options.config, job, options.runs)
            if code != 0:
                return code
            keep(result, options.config, job, options.runs / job.name)
        elif not is_of(result, options.config, job):
            settings = " ".join([str(options.config), *job.overrides])
            print(
                f"error: {result} is of other settings than {settings}; give the variant another name, or remove that "
                "file and its run.",
                file=sys.stderr,
            )
            return 2
        # several GB; or gone already
        checkpoints = options.runs / job.name / "checkpoints"
        shutil.rmtree(checkpoints, ignore_errors=True)
    try:
        results = {path.name: json.loads(path.read_text()) for path in sorted(options.out.glob("*.json"))}
        rulers = {name: result.get("ruler", {}) for name, result in results.items()}
        unlike = check_same_ruler(rulers, options.anyway)
        print(tables(list(results.values())))
        for name, difference in unlike.items():
            print(f"\n{name}: {difference}.")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (ValueError, KeyError, TypeError) as error:
        print(f"error: a file in {options.out} is not a result of this tool: {error!r}", file=sys.stderr)
        return 2
    return 0


def is_of(result: Path, config: Path, job: Job) -> bool:
    try:
        made = json.loads(result.read_text())
        return [made["config"], *made["overrides"]] == [str(config), *job.overrides]
    except (ValueError, KeyError, TypeError):
        return False


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="the experiment that all variants change")
    parser.add_argument("--out", type=Path, required=True, help="directory of the results")
    parser.add_argument("--runs", type=Path, default=Path("runs/compare"), help="directory of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--variant",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "section.key=value"),
        help="its name, and the settings that make it; may be given several times",
    )
    parser.add_argument(
        "--anyway", action="store_true", help="show results of unlike rulers too, named below"
    )
    options = parser.parse_args()
    if not options.config.is_file():
        parser.error(f"there is no file {options.config}")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {options.out} cannot be a directory: {error.strerror}")
    return options


def run(config: Path, job: Job, runs: Path) -> int:
    """Makes a run and returns the trainer's exit code; 0 for a run that is complete."""
    print(f"== {job.name}", flush=True)
    fixed = [f"run.dir={runs}", f"run.name={job.name}", f"run.seed={job.seed}"]
    command = [sys.executable, "-m", "sdpo_megatron.train", str(config), *job.overrides, *fixed]
    return run_until_stopped(command)


def keep(path: Path, config: Path, job: Job, directory: Path) -> None:
    rows = read_rows(directory / "metrics.jsonl")
    try:
        measured = read_curve(directory, HELD_OUT)
    # a task without held-out problems
    except UserError:
        measured = Curve(points=[], ruler={})
    described = json.loads((directory / "config.json").read_text())
    result = {
        "variant": job.variant,
        "seed": job.seed,
        "config": str(config),
        "overrides": list(job.overrides),
        "code": described["code"],
        "machine": machine(),
        "ruler": dict(measured.ruler),
        "curve": curve(measured.points),
        "median_step_seconds": step_seconds(rows),
        "peak_memory_gib": round(max(row["memory/all_processes_gib"] for row in rows), 2),
    }
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(part, path)


def machine() -> dict[str, Any]:
    models = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
    ]
    return {"cpu": models[0].partition(":")[2].strip(), "cores": len(os.sched_getaffinity(0))}


def curve(points: Sequence[Point]) -> list[dict[str, float | None]]:
    """Returns the evaluations, with the minutes of training that came before each."""
    return [
        {
            "step": point.step,
            "minutes": round(point.hours * 60, 2),
            "exact_answer_prob": point.value(EXACT),
            "correct": point.value(ACCURACY),
        }
        for point in points
    ]


def step_seconds(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    steps = [row for row in rows if "time/learn" in row]
    phases = sorted({key for row in steps for key in row if key.startswith("time/")} - set(NOT_LEARNING))
    split = {
        phase.removeprefix("time/"): round(statistics.median(row.get(phase, 0.0) for row in steps), 2)
        for phase in phases
    }
    return split | {"step": round(statistics.median(map(learning_seconds, steps)), 2)}


def tables(results: Sequence[dict[str, Any]]) -> str:
    """Returns Markdown: the mean over the seeds, and each seed's value behind it."""
    if not results:
        return "No results yet."
    steps = sorted({point["step"] for result in results for point in result["curve"]})
    longest = max((point["minutes"] for result in results for point in result["curve"]), default=0.0)
    minutes = [round(longest * k / 4, 1) for k in range(1, 5)]

    def at_step(result: dict[str, Any], step: int) -> float | None:
        return next((p["exact_answer_prob"] for p in result["curve"] if p["step"] == step), None)

    def at_minute(result: dict[str, Any], minute: float) -> float | None:
        """Returns the value on the line between the evaluations before and after; after the last one, the last."""
        known = [p for p in result["curve"] if p["exact_answer_prob"] is not None]
        if not known:
            return None
        return float(
            np.interp(minute, [p["minutes"] for p in known], [p["exact_answer_prob"] for p in known])
        )

    processors = {result["machine"]["cpu"] for result in results}

    def on_processor(result: dict[str, Any]) -> str:
        """Names the processor too where there are several: their minutes do not compare."""
        return result["variant"] + (f" ({result['machine']['cpu']})" if len(processors) > 1 else "")

    return "\n\n".join(
        [
            table(results, "exact, by step", steps, at_step, lambda result: result["variant"]),
            table(results, "exact, by minute of training", minutes, at_minute, on_processor),
        ]
    )


def table(
    results: Sequence[dict[str, Any]], title: str, columns: Sequence[Any], value: Any, name: Any
) -> str:
    lines = [
        f"| {title} | {' | '.join(str(column) for column in columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for row in sorted({name(result) for result in results}):
        runs = sorted((r for r in results if name(r) == row), key=lambda r: r["seed"])
        cells = [cell([value(result, column) for result in runs]) for column in columns]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = f"{statistics.mean(known):.3f}"
    return mean if len(known) == 1 else f"{mean} ({', '.join(f'{value:.2f}' for value in known)})"


if __name__ == "__main__":
    sys.exit(main())
