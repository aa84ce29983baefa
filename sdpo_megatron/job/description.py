"""A job as it lies in its run directory, and what its attempts came to: all that an attempt needs, in plain files."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from sdpo_megatron.cluster.hardware import HardwareSettings
from sdpo_megatron.errors import EXIT_FAILED, UserError
from sdpo_megatron.files import write_atomically
from sdpo_megatron.job.requeue import Attempt
from sdpo_megatron.strict_yaml.section import Section

SILENT = "it ended without a word, as where a node is lost"


class JobDirectory:
    """`job/` in a run directory."""

    def __init__(self, path: Path) -> None:
        self.path: Final = path
        self.description: Final = path / "job.json"
        self.attempts: Final = path / "attempts.jsonl"
        self.number: Final = path / "number"
        """Which job of Slurm's it is."""
        self.asked: Final = path / "asked"
        """Which job somebody has asked to stop: it may hear of that while it already ends, to come back."""
        self.begun: Final = path / "begun"
        """How many attempts have begun."""
        self.claim: Final = path / ".claim"
        """Locked by who submits the run."""
        self.code: Final = path / "code"
        """The package as it was when the job was submitted."""
        self.settings: Final = path / "settings.yaml"
        """All settings of the experiment."""
        self.inputs: Final = path / "inputs.json"
        """The files that the run reads, with their hashes."""
        self.setup: Final = path / "setup.sh"
        """The shell lines in front of the job's program."""
        self.key: Final = path / "server_key"
        """The servers' key, while an attempt runs."""


class Job(Section):
    name: str
    hardware: HardwareSettings
    arguments: tuple[str, ...]
    """Of sdpo_megatron.train: files by absolute paths, and overrides."""
    python: str
    """The interpreter of the trainer's environment."""


def ask_to_stop(directory: JobDirectory, number: str) -> None:
    """Notes that the job of this number is not to come back."""
    write_atomically(directory.asked, f"{number}\n")


def is_asked_to_stop(directory: JobDirectory) -> bool:
    """Returns whether the run's job, and not one before it, is."""
    return directory.asked.is_file() and directory.asked.read_text() == directory.number.read_text()


def write_job(directory: JobDirectory, job: Job) -> None:
    directory.path.mkdir(parents=True, exist_ok=True)
    write_atomically(directory.description, job.model_dump_json(indent=2) + "\n")


def read_job(directory: JobDirectory) -> Job:
    """Raises UserError where there is none, or it is damaged."""
    try:
        return Job.model_validate_json(directory.description.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"{directory.description} is not there: submit the run with slurm/submit.py."
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{directory.description} is damaged ({where}: {first['msg']}); submit the run again."
        ) from None


def read_attempts(directory: JobDirectory) -> list[Attempt]:
    """Returns the attempts that have ended, oldest first; a line that a crash cut short ends them."""
    attempts: list[Attempt] = []
    if directory.attempts.is_file():
        for line in directory.attempts.read_text(encoding="utf-8").splitlines():
            try:
                attempts.append(Attempt(**json.loads(line)))
            except (ValueError, TypeError):
                break
    return attempts


def attempts_begun(directory: JobDirectory) -> int:
    """Returns how many attempts have begun."""
    return int(directory.begun.read_text()) if directory.begun.is_file() else 0


def begin_attempt(directory: JobDirectory, steps: int, job: int = 0) -> list[Attempt]:
    """Returns the attempts before the one that begins now. One that has not said how it ended, as where its node was
    lost, failed; `steps` are behind the run now."""
    attempts = lost_attempts(directory, steps, job, SILENT)
    if attempts and (attempts[-1].job, attempts[-1].why) == (job, "asked"):
        # the signal was Slurm's, which takes a job's nodes in more than one way
        attempts[-1] = replace(attempts[-1], why="preempted")
    write_attempts(directory, attempts)
    write_atomically(directory.begun, f"{len(attempts) + 1}\n")
    return attempts


def lost_attempts(directory: JobDirectory, steps: int, job: int, reason: str) -> list[Attempt]:
    """Returns the attempts that have begun, of which those that have not said how they ended failed for `reason`."""
    attempts = read_attempts(directory)
    begun = attempts_begun(directory)
    lost = Attempt(why="failed", steps=steps, exit_code=EXIT_FAILED, reason=reason, job=job)
    return [*attempts, *[lost] * (begun - len(attempts))]


def write_attempts(directory: JobDirectory, attempts: Sequence[Attempt]) -> None:
    lines = "".join(json.dumps(asdict(attempt)) + "\n" for attempt in attempts)
    write_atomically(directory.attempts, lines)
