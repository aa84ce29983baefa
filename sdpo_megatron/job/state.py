"""What is to be said of a job from its run directory and Slurm's queue."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdpo_megatron.errors import UserError
from sdpo_megatron.files import write_atomically
from sdpo_megatron.job.description import JobDirectory, attempts_begun, read_attempts
from sdpo_megatron.job.reasons import log_of, text_of
from sdpo_megatron.job.requeue import Attempt
from sdpo_megatron.job.slurm import squeue
from sdpo_megatron.job.this_machine import LOCAL, runs_here
from sdpo_megatron.run_dir.directory import RunDirectory, stored_values
from sdpo_megatron.run_dir.display import SHOWN, duration
from sdpo_megatron.run_dir.metrics_file import read_rows
from sdpo_megatron.run_dir.phases import read_phase

RATE_OF = 5
"""The newest steps whose mean time is shown."""
LOG_LINES = 10
ENDED = {
    "finished": "finished",
    "asked": "stopped, and saved",
    "failed": "failed",
    "preempted": "ended, though it was to come back: submit it again",
}


@dataclass(frozen=True)
class Queued:
    """What squeue says of a job that has not ended."""

    state: str
    reason: str
    left: str
    """Of its time limit; empty where that is not known."""
    nodes: str


def write_number(directory: JobDirectory, number: str) -> None:
    """Notes which job of Slurm's it is."""
    write_atomically(directory.number, f"{number}\n")


def number_of(run: Path) -> str:
    """Returns the job's number. Raises UserError where nothing was submitted for `run`."""
    path = JobDirectory(run / "job").number
    try:
        return path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise UserError(f"{path} is not there: {run} was not submitted by slurm/submit.py.") from None


def queued(number: str) -> Queued | None:
    """Returns None for a job that has ended. Raises RunFailed where Slurm does not answer."""
    if number.startswith(LOCAL):
        return Queued("RUNNING", "", "", "this machine") if runs_here(number) else None
    told = squeue(number, "%T|%r|%L|%N")
    return Queued(*told[-1]) if told else None


def in_words(run: Path, number: str, queue: Queued | None) -> list[str]:
    """Returns lines about a job: state, progress, metrics, earlier attempts, and the end of what failed."""
    directory = RunDirectory(run)
    rows, attempts = read_rows(directory.metrics), read_attempts(JobDirectory(run / "job"))
    begun = attempts_begun(JobDirectory(run / "job"))
    lines = [
        f"{run.name}, job {number}: {_state(queue, attempts, lost=begun > len(attempts))}",
        f"    {_progress(directory, rows)}",
    ]
    if metrics := _metrics(rows):
        lines.append(f"    {metrics}")
    if queue is not None and (hang := _hang(directory, len(attempts))):
        lines.append(f"    {hang}")
    for k, attempt in enumerate(attempts):
        reason = f" ({attempt.reason})" if attempt.reason else ""
        lines.append(f"    attempt {k}: {attempt.why} after {attempt.steps} steps{reason}")
    if queue is None and attempts and attempts[-1].why == "failed":
        log = log_of(run / "logs" / f"attempt_{len(attempts) - 1:03d}", attempts[-1].reason)
        lines.append(f"    the end of {log}:")
        lines += [f"        {line}" for line in text_of(log).splitlines()[-LOG_LINES:]]
    return lines


def _state(queue: Queued | None, attempts: Sequence[Attempt], *, lost: bool) -> str:
    if queue is None and lost:
        return "ended without a word, as where all of it was killed: submit it again"
    if queue is None:
        why = attempts[-1].why if attempts else ""
        return ENDED.get(why, "ended before its first attempt did, or cancelled: see job/submitit")
    if queue.state == "PENDING":
        return f"waits ({queue.reason})"
    # Slurm says INVALID of a job that ends at this moment
    left = f", {queue.left} left of its time" if queue.left[:1].isdigit() else ""
    return f"{queue.state.lower()} on {queue.nodes}{left}"


def _progress(directory: RunDirectory, rows: Sequence[Mapping[str, Any]]) -> str:
    if not directory.config.is_file():
        return "has not begun to train"
    steps = stored_values(directory)["run"]["steps"]
    if not rows:
        phase = read_phase(directory.phase(0))
        return f"no step of {steps} yet" + ("" if phase is None else f"; rank 0 is in phase {phase.phase}")
    seconds = [row["time/total"] for row in rows[-RATE_OF:]]
    mean = sum(seconds) / len(seconds)
    return f"step {int(rows[-1]['step'])} of {steps}, {duration(mean)} a step"


def _metrics(rows: Sequence[Mapping[str, Any]]) -> str:
    newest: dict[str, float] = {}
    for row in rows:
        newest |= {key: value for key, value in row.items() if value is not None}
    return ", ".join(f"{label} {newest[key]:.3g}" for key, label in SHOWN.items() if key in newest)


def _hang(directory: RunDirectory, number: int) -> str:
    """Returns what hung in the attempt that runs, as far as anything did."""
    path, logs = directory.logs / "diagnosis.txt", directory.logs / f"attempt_{number:03d}"
    if not path.is_file() or not logs.is_dir() or path.stat().st_mtime < logs.stat().st_ctime:
        return ""
    return f"at {path.read_text(encoding='utf-8').partition(chr(10))[0]} ({path})"
