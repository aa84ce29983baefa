"""The log of a run: metrics.jsonl, rollouts/, what the terminal shows, TensorBoard and W&B; and the time of
each phase.

Rank 0 has a RunLog, the others a Log with the same methods, so that every rank runs the same loop:

    with log.step(step):
        with log.timed("rollout"):
            ...
        log.add({"env/all/correct": 0.5})
        log.record("train", record)

A row holds `step`, what was added, `time/PHASE` of each phase, `time/total` and `time/rest`,
`progress/done_frac`, `memory/all_processes_gib`, `perf/trained_tokens_per_s` where `perf/trained_tokens` was added,
and `perf/teacher_time_share` where there is a teacher.
"""

import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from sdpo_megatron.config import LogSettings
from sdpo_megatron.errors import UserError
from sdpo_megatron.files import write_atomically
from sdpo_megatron.run_dir.background_writer import BackgroundWriter
from sdpo_megatron.run_dir.directory import RunDirectory
from sdpo_megatron.run_dir.display import RunDisplay, print_summary
from sdpo_megatron.run_dir.evaluations_file import Evaluation, EvaluationsFile
from sdpo_megatron.run_dir.memory import PeakMemory
from sdpo_megatron.run_dir.metrics_file import MetricsFile
from sdpo_megatron.run_dir.phases import PhaseFile
from sdpo_megatron.run_dir.records_file import StepRecord, write_record
from sdpo_megatron.run_dir.rollout_json import json_beside, write_json


class Log:
    """The log of a rank other than 0, which keeps the rank's phase file, nothing else."""

    def __init__(self, phases: PhaseFile, first_step: int) -> None:
        self._phases = phases
        self._step = first_step

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        self._step = step
        yield

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        self._enter(phase)
        yield
        self._enter("rest")

    def add(self, metrics: Mapping[str, float]) -> None:
        """Adds numbers to the row of this step."""

    def record(self, split: str, record: StepRecord) -> None:
        """Has the responses of this step written beside training; `split` is what RunDirectory.rollouts takes."""

    def evaluated(self, evaluation: Evaluation) -> None:
        """Writes what an evaluation came to, with its ruler."""

    def settle(self) -> None:
        """Waits until all records are on the disk."""

    def message(self, text: str) -> None:
        """Shows a line to the person who watches."""

    def finish(self) -> None:
        """Shows what a complete run has achieved."""

    def close(self) -> None:
        """Stops the display and flushes; to be called after a failure too."""
        self._phases.close()

    def _enter(self, phase: str) -> None:
        self._phases.enter(self._step, phase)


class RunLog(Log):
    """The log of rank 0."""

    def __init__(
        self,
        directory: RunDirectory,
        settings: LogSettings,
        phases: PhaseFile,
        *,
        name: str,
        steps: int,
        first_step: int,
        memory_root: int,
        report: Callable[[], object] | None = None,
    ) -> None:
        """`first_step` is the first step this process makes; rows from there on are dropped from
        metrics.jsonl.

        `memory_root` is the process id of the launcher, whose descendants count as this run's. `report` brings the
        report of the run up to date; it is called beside training, in a thread.
        """
        super().__init__(phases, first_step)
        self._directory, self._settings, self._steps = directory, settings, steps
        self._metrics = MetricsFile(directory.metrics, first_step)
        self._evaluations = EvaluationsFile(directory.evaluations, first_step)
        self._trackers = _trackers(directory, settings, name, first_step)
        self._memory = PeakMemory(memory_root)
        self._row: dict[str, float] = {}
        self._times: dict[str, float] = {}
        self._row_began = time.monotonic()
        self._display = RunDisplay(name, steps, first_step)
        self._writer = BackgroundWriter(self._warn_of_records)
        self._report = report if settings.report_every else None
        self._reporter = BackgroundWriter(self._warn_of_report)

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Writes the row of `step` on leaving, unless by an exception.

        What was timed since the last row counts, so that a checkpoint may be saved after the row before it is
        on the disk: no checkpoint then ever follows a row that a crash took.
        """
        self._step = step
        self._display.phase(step, "rest")
        yield
        row = self._finished_row()
        self._metrics.append(row)
        for tracker in list(self._trackers):
            self._observe(tracker, lambda tracker=tracker: tracker.write(row))
        self._display.row(row)
        if self._report is not None and (self._step + 1) % self._settings.report_every == 0:
            self._reporter.offer("writing the report", self._write_report)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Credits `time/PHASE` and writes the phase file. Phases do not nest."""
        self._enter(phase)
        self._display.phase(self._step, phase)
        began = time.monotonic()
        yield
        self._times[phase] = self._times.get(phase, 0.0) + time.monotonic() - began
        self._display.phase(self._step, "rest")
        self._enter("rest")

    def add(self, metrics: Mapping[str, float]) -> None:
        twice = self._row.keys() & metrics.keys()
        if twice:
            raise ValueError(f"added twice in step {self._step}: {', '.join(sorted(twice))}")
        self._row |= metrics

    def record(self, split: str, record: StepRecord) -> None:
        if self._settings.rollouts:
            path = self._directory.rollouts(split, self._step)
            self._writer.put(f"writing {path}", lambda: self._write_record(path, record))

    def evaluated(self, evaluation: Evaluation) -> None:
        self._evaluations.append(evaluation)

    def settle(self) -> None:
        self._writer.settle()

    def message(self, text: str) -> None:
        self._display.message(text)

    def finish(self) -> None:
        self._enter("finish")
        self.settle()
        if self._report is not None:
            self._reporter.settle()
            self._reporter.put("writing the report", self._write_report)
            self._reporter.settle()
        self._display.close()
        print_summary(self._directory.metrics)

    def close(self) -> None:
        super().close()
        self.settle()
        self._display.close()
        self._memory.close()
        for tracker in list(self._trackers):
            self._observe(tracker, tracker.close)

    def _write_record(self, path: Path, record: StepRecord) -> None:
        # it is of an earlier try
        json_beside(path).unlink(missing_ok=True)
        write_record(path, record)
        if self._settings.rollout_json_export and path.is_file():
            write_json(path)

    def _write_report(self) -> None:
        """Runs in the reporter's thread."""
        self._writer.wait()
        if self._report is not None:
            self._report()

    def _warn_of_report(self, failure: str) -> None:
        self.message(f"warning: {failure}; training goes on, and it is tried again later.")

    def _warn_of_records(self, failure: str) -> None:
        self.message(f"warning: {failure}; training goes on, and later steps' records are tried again.")

    def _observe(self, tracker: "_Tracker", call: Callable[[], None]) -> None:
        """Calls a tracker, which must never stop training: one that fails is named, once, and left alone from then."""
        try:
            call()
        # whatever a tracker or its disk, service or network raises
        except Exception as error:
            self._trackers.remove(tracker)
            reason = " ".join(str(error).split())[:200]
            self.message(
                f"warning: {tracker.name} failed ({type(error).__name__}: {reason}) and gets no more rows; "
                "metrics.jsonl has them all."
            )

    def _finished_row(self) -> dict[str, float]:
        now = time.monotonic()
        total = now - self._row_began
        row: dict[str, float] = {
            "step": self._step,
            "progress/done_frac": self._step / self._steps,
            **self._row,
        }
        if "perf/trained_tokens" in row:
            row["perf/trained_tokens_per_s"] = row["perf/trained_tokens"] / total
        if "teacher" in self._times:
            row["perf/teacher_time_share"] = self._times["teacher"] / total
        row["memory/all_processes_gib"] = self._memory.take() / 2**30
        row |= {f"time/{phase}": seconds for phase, seconds in self._times.items()}
        row |= {"time/rest": total - sum(self._times.values()), "time/total": total}
        self._row, self._times, self._row_began = {}, {}, now
        return row


class _Tracker(Protocol):
    name: str

    def write(self, row: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def _trackers(directory: RunDirectory, settings: LogSettings, name: str, first_step: int) -> list[_Tracker]:
    trackers: list[_Tracker] = []
    if settings.tensorboard:
        trackers.append(_TensorBoard(directory, first_step))
    if settings.wandb != "off":
        trackers.append(_WandB(directory, settings, name))
    return trackers


class _TensorBoard:
    name = "TensorBoard"

    def __init__(self, directory: RunDirectory, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "log.tensorboard is on, but the package tensorboard is not installed; run: pip install "
                "tensorboard"
            ) from None
        # What a resumed run makes again is hidden from `purge_step` on.
        self._writer = SummaryWriter(str(directory.tensorboard), purge_step=first_step)

    def write(self, row: Mapping[str, float]) -> None:
        for key, value in row.items():
            if key != "step":
                self._writer.add_scalar(key, value, int(row["step"]))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WandB:
    name = "W&B"

    def __init__(self, directory: RunDirectory, settings: LogSettings, name: str) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(
                "log.wandb is on, but the package wandb is not installed; run: pip install wandb"
            ) from None
        file = directory.path / "wandb_run_id"
        if not file.is_file():
            write_atomically(file, secrets.token_hex(8))
        try:
            self._run = wandb.init(
                project=settings.wandb_project,
                name=name,
                id=file.read_text(encoding="utf-8"),
                resume="allow",
                dir=str(directory.path),
                mode="offline" if settings.wandb == "offline" else "online",
                # it would record the command, the machine and its users' names
                settings=wandb.Settings(x_disable_meta=True, disable_git=True, disable_code=True),
                config=json.loads(directory.config.read_text(encoding="utf-8"))["values"],
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"W&B does not start ({reason}); run: wandb login, or set log.wandb=offline."
            ) from None

    def write(self, row: Mapping[str, float]) -> None:
        self._run.log(dict(row), step=int(row["step"]))

    def close(self) -> None:
        self._run.finish()


def line_writer(path: Path) -> Callable[[str], None]:
    """Returns what adds a line to the file `path`."""

    def write(line: str) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    return write
