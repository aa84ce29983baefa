"""What a person sees of a run: a live line in a terminal, one line per step anywhere else, a table at the
end."""

import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sdpo_megatron.run_dir.directory import RunDirectory
from sdpo_megatron.run_dir.metrics_file import read_rows
from sdpo_megatron.terminal import Screen

SHOWN = {
    "env/all/reward/total": "reward",
    "test/env/all/correct": "held-out accuracy",
    "test/exact_answer_prob": "exact answer prob",
    "perf/trained_tokens_per_s": "trained tokens/s",
}
SUMMARY = {
    "test/exact_answer_prob": "held-out: probability of the exact answer",
    "test/env/all/correct": "held-out: accuracy of sampled answers",
    "env/all/correct": "training: accuracy of sampled answers",
    "env/all/reward/total": "training: mean reward",
}


def with_suites(labels: Mapping[str, str], keys: Iterable[str]) -> dict[str, str]:
    """Returns the labels, and those of the suites' accuracies among the keys of a row."""
    end = "/env/all/correct"
    suites = [key.removesuffix(end) for key in keys if key.startswith("test_") and key.endswith(end)]
    return dict(labels) | {f"{suite}{end}": f"{suite.removeprefix('test_')} accuracy" for suite in suites}


class RunDisplay:
    """The display: live in a terminal, plain lines otherwise. `name` and `steps` are the run's."""

    def __init__(self, name: str, steps: int, first_step: int, console: Console | None = None) -> None:
        self._name, self._steps, self._step = name, steps, first_step
        self._console = console or Screen()
        self._phase, self._phase_began = "start", time.monotonic()
        self._latest: dict[str, float] = {}
        self._seconds = deque[float](maxlen=5)
        self._live: Live | None = None
        if self._console.is_terminal:
            self._live = Live(
                console=self._console, get_renderable=self._render, refresh_per_second=2, transient=True
            )
            self._live.start()

    def phase(self, step: int, phase: str) -> None:
        self._step, self._phase, self._phase_began = step, phase, time.monotonic()

    def row(self, row: Mapping[str, Any]) -> None:
        """Prints the step that is done."""
        self._latest |= {key: row[key] for key in SHOWN if row.get(key) is not None}
        # servers start once
        self._seconds.append(row["time/total"] - row.get("time/server_start", 0.0))
        parts = [f"step {row['step']:>{len(str(self._steps))}}/{self._steps}"]
        labels = with_suites(SHOWN, row)
        parts += [f"{label} {_short(row[key])}" for key, label in labels.items() if row.get(key) is not None]
        split = time_split(row)
        parts.append(f"{row['time/total']:.1f} s{f' ({split})' if split else ''}")
        if row["step"] < self._steps:
            parts.append(f"left {duration(self._time_left(row['step'] + 1))}")
        self._console.print("  ".join(parts), markup=False)

    def message(self, text: str) -> None:
        self._console.print(text, markup=False)

    def close(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def _time_left(self, step: int) -> float:
        """Seconds, from the mean of the last five steps; the final evaluation counts as nothing."""
        return (self._steps - step) * sum(self._seconds) / len(self._seconds)

    def _render(self) -> RenderableType:
        in_phase = time.monotonic() - self._phase_began
        facts = [
            f"{label} {_short(self._latest[key])}" for key, label in SHOWN.items() if key in self._latest
        ]
        if self._seconds:
            facts.append(f"left {duration(self._time_left(self._step))}")
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(self._name, style="bold"),
            ProgressBar(total=self._steps, completed=self._step, width=24),
            Text(f"step {self._step}/{self._steps}"),
            Text(f"{self._phase} {in_phase:.0f} s", style="cyan"),
        )
        return Group(head, Text("   ".join(facts)))


def time_split(row: Mapping[str, Any]) -> str:
    """Returns where the time of a step went, longest first, without what took less than a tenth of a second."""
    parts = {key.removeprefix("time/"): value for key, value in row.items() if key.startswith("time/")}
    parts.pop("total", None)
    longest = sorted(parts.items(), key=lambda item: -item[1])
    return ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in longest if seconds >= 0.1)


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _short(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"


def before_after(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Returns a table of the first and the last value of each metric of SUMMARY that any row has."""
    table = Table("", "before", "after", "change", title="Before and after")
    for column in table.columns[1:]:
        # where the terminal is narrow, the labels give way
        column.justify, column.no_wrap = "right", True
    for key, label in with_suites(SUMMARY, dict.fromkeys(key for row in rows for key in row)).items():
        found = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if not found:
            continue
        (first_step, first), (last_step, last) = found[0], found[-1]
        table.add_row(
            label,
            f"{first:.3f} (step {first_step})",
            f"{last:.3f} (step {last_step})",
            f"{last - first:+.3f}",
        )
    return table


def print_summary(metrics: Path, console: Console | None = None) -> None:
    """Prints the before/after table of a run from its metrics.jsonl, and where its directory and its report, if it has
    one, are."""
    console = console or Screen()
    console.print(before_after(read_rows(metrics)))
    console.print(f"Run directory: {metrics.parent}", markup=False)
    page = RunDirectory(metrics.parent).report / "index.html"
    if page.is_file():
        console.print(f"Report: {page}  {page.resolve().as_uri()}", markup=False)
