"""What the files of a run say of its accuracy over steps, time and generated tokens."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdpo_megatron.errors import UserError
from sdpo_megatron.run_dir.directory import RunDirectory
from sdpo_megatron.run_dir.evaluations_file import Evaluation, Ruler, read_evaluations
from sdpo_megatron.run_dir.metrics_file import read_rows

NOT_LEARNING = ("time/total", "time/eval", "time/checkpoint", "time/server_start")
"""Parts of a row's time that are not the time of its training step."""
ACCURACY = "avg@"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One evaluation of a run."""

    step: int
    hours: float
    """Of training before it; evaluations, checkpoints and the server's start do not count."""
    tokens: float
    """Response tokens that were sampled for training before it."""
    metrics: Mapping[str, float]

    def name(self, measure: str) -> str | None:
        """Returns the name of the metric, which may be said by its beginning (`avg@` for avg@8); None for none."""
        if measure in self.metrics:
            return measure
        return next((name for name in self.metrics if "/" not in name and name.startswith(measure)), None)

    def value(self, measure: str) -> float | None:
        name = self.name(measure)
        return None if name is None else self.metrics[name]


@dataclass(frozen=True, kw_only=True)
class Curve:
    points: list[Point]
    ruler: Ruler


def learning_seconds(row: Mapping[str, Any]) -> float:
    """Returns how long the training step of a row of metrics.jsonl took."""
    return sum(value for key, value in row.items() if key.startswith("time/") and key not in NOT_LEARNING)


def read_curve(path: Path, suite: str) -> Curve:
    """Reads the evaluations of `suite` in the run directory `path`. Raises UserError where it has none, or is none."""
    directory = RunDirectory(path)
    if not directory.metrics.is_file():
        raise UserError(f"{path} is no directory of a run that has begun: it has no metrics.jsonl.")
    # a run that evaluates nothing has no such file
    evaluations = read_evaluations(directory.evaluations) if directory.evaluations.is_file() else []
    of_suite = [one for one in evaluations if one.suite == suite]
    if not of_suite:
        names = ", ".join(dict.fromkeys(one.suite for one in evaluations)) or "none"
        raise UserError(f"{path} has no evaluation of the suite '{suite}'; it has: {names}.")
    return Curve(points=curve_points(read_rows(directory.metrics), of_suite), ruler=of_suite[-1].ruler)


def curve_points(rows: Sequence[Mapping[str, Any]], evaluations: Sequence[Evaluation]) -> list[Point]:
    """Returns a point for each evaluation, in the order of their steps; `rows` are those of metrics.jsonl."""
    seconds = [0.0, *itertools.accumulate(learning_seconds(row) for row in rows)]
    tokens = [0.0, *itertools.accumulate(row.get("perf/response_tokens") or 0.0 for row in rows)]
    return [
        Point(
            step=one.step, hours=seconds[one.step] / 3600, tokens=tokens[one.step], metrics=dict(one.metrics)
        )
        for one in evaluations
        if one.step is not None and one.step < len(seconds)
    ]
