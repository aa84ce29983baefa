"""The run directory: what stays behind a run, and who may write into it.

runs/NAME/
├── config.json        every setting with its origin, code revision, package versions
├── snapshots.json     where models of the Hugging Face Hub lie, if it has some
├── metrics.jsonl      one row per step, in order
├── evaluations.jsonl  one row per evaluation of a suite: numbers, and the ruler they were measured by
├── rollouts/          train/000012.jsonl, eval/000010.jsonl: one line per response; train/000012.npz: per token;
│                      inflight/000012/: the responses that a step has by now
├── checkpoints/       000010/: after ten training steps
├── logs/              servers, ranks; of jobs of Slurm in attempt_000/ and so on
├── job/               of jobs of Slurm: what was submitted, and how its attempts ended
├── caches/            of jobs of Slurm: what was compiled, for the next attempt
├── rounding.json      what the model's type makes of log-probabilities, in nats
├── phases/            rank_0.json: what that rank is doing
├── endings/           rank_0.json: why that rank ended, in its own words
├── report/            index.html, with log.report_every or python -m sdpo_megatron.report
├── tensorboard/       with log.tensorboard
└── hf/                with checkpoint.export_hf
"""

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, Final

from sdpo_megatron.errors import UserError
from sdpo_megatron.files import read_text, write_atomically
from sdpo_megatron.run_dir.checkpoint_files import CHECKPOINTS, newest_checkpoint
from sdpo_megatron.run_dir.identity import differences
from sdpo_megatron.run_dir.metrics_file import read_rows, rows_before

CACHES = "caches"
OF_A_JOB = ("job", "logs", CACHES, "snapshots.json")
"""What is there before a run that Slurm starts."""


class RunDirectory:
    """Paths of one run. `RunDirectory(path)` only names them; `open_run` makes them."""

    def __init__(self, path: Path, lock: int | None = None) -> None:
        """`lock` is the descriptor of the lock that keeps others out; None where this process does not hold it."""
        self.path: Final = path
        self.lock: Final = lock
        self.config: Final = path / "config.json"
        self.snapshots: Final = path / "snapshots.json"
        self.metrics: Final = path / "metrics.jsonl"
        self.evaluations: Final = path / "evaluations.jsonl"
        self.checkpoints: Final = path / CHECKPOINTS
        self.logs: Final = path / "logs"
        self.rounding: Final = path / "rounding.json"
        self.servers: Final = path / "servers"
        self.phases: Final = path / "phases"
        self.endings: Final = path / "endings"
        self.rendezvous: Final = path / ".rendezvous"
        """Where the launcher's ranks find each other, while they run."""
        self.tensorboard: Final = path / "tensorboard"
        self.report: Final = path / "report"
        self.hf_export: Final = path / "hf"
        self.inflight: Final = path / "rollouts" / "inflight"
        """Where the responses of the step under way are; see run_dir/inflight.py."""

    def close(self) -> None:
        """Lets others in; the end of the process does the same."""
        if self.lock is not None:
            os.close(self.lock)

    def forget_earlier_start(self) -> None:
        """Removes what the ranks and servers of an earlier start said of themselves."""
        for folder in (self.phases, self.endings, self.servers):
            for path in folder.iterdir() if folder.is_dir() else ():
                path.unlink()
        # of ranks that were killed
        self.rendezvous.unlink(missing_ok=True)

    def rollouts(self, split: str, step: int) -> Path:
        """Returns the path of a step's responses; `split` is "train", "eval", or "eval_" and a suite's name."""
        return self.path / "rollouts" / split / f"{step:06d}.jsonl"

    def phase(self, rank: int) -> Path:
        return self.phases / f"rank_{rank}.json"

    def stacks(self, rank: int) -> Path:
        return self.phases / f"rank_{rank}.stacks"

    def ending(self, rank: int) -> Path:
        return self.endings / f"rank_{rank}.json"


def check_run(path: Path, values: Mapping[str, Any]) -> RunDirectory:
    """Returns the run directory `path`, made or not; changes nothing. `values` is `Config.model_dump()`.

    A start that left neither a row nor a checkpoint binds the directory to nothing. Raises UserError where `path`
    belongs to another experiment or to something else, or has lost its checkpoints or its rows.
    """
    directory = RunDirectory(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file, where the run directory should be; choose another run.name.")
    if directory.config.is_file():
        rows = read_rows(directory.metrics)
        if rows or any(name.isdecimal() for name in _names_in(directory.checkpoints)):
            stored = stored_values(directory)
            _check_identity(directory, stored, values)
            newest = newest_checkpoint(directory.checkpoints)
            if newest is not None:
                _check_steps(path, int(newest.name), values)
                rows_before(directory.metrics, int(newest.name))
            elif rows:
                _check_never_saved(directory, stored, rows[-1]["step"])
    elif any(not name.startswith(".") and name not in OF_A_JOB for name in _names_in(path)):
        raise UserError(
            f"{path} exists, but is no run directory (it has no config.json); choose another run.name or "
            "remove it."
        )
    return directory


def parent_holds(path: Path) -> bool:
    """Returns whether the parent of this process, the launcher, has locked the run directory `path`."""
    lock = path / ".lock"
    # read first: who looks whether somebody holds a lock keeps others from it meanwhile
    is_parents = lock.is_file() and lock.read_text().strip() == str(os.getppid())
    # an old lock is not held; that process number was given again
    return is_parents and lock_owner(RunDirectory(path)) is not None


def lock_owner(directory: RunDirectory) -> str | None:
    """Returns the number of the process that has locked the run directory, None where none has."""
    try:
        descriptor = os.open(directory.path / ".lock", os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        is_free = try_lock(descriptor, fcntl.LOCK_SH)
        return None if is_free else os.pread(descriptor, 64, 0).decode().strip()
    finally:
        os.close(descriptor)


def try_lock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Locks an open file, unless somebody holds it; returns whether it did. The lock goes with the descriptor."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def rendezvous_of(directory: RunDirectory) -> Path | None:
    """Returns where the ranks of the launcher meet, None for those that something else has started: a file of the
    owner's is no socket that anybody on the machine may connect to."""
    return directory.rendezvous if parent_holds(directory.path) else None


def open_run(path: Path, values: Mapping[str, Any], origins: Mapping[str, str]) -> RunDirectory:
    """Makes the run directory `path`, or reopens it for the same experiment, and locks it.

    One process of a run does this: the launcher, or rank 0 where there is none. config.json describes the
    latest start. `values` is `Config.model_dump()`, `origins` what `strict_yaml.load_config` returned.
    Raises UserError where `path` belongs to another experiment or to something else, or is in use.
    """
    directory = check_run(path, values)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if values.get("run", {}).get("private"):
            path.chmod(0o700)
        directory = RunDirectory(path, lock=_lock(path))
        write_atomically(directory.config, json.dumps(_description(values, origins), indent=2) + "\n")
        for folder in (CHECKPOINTS, "logs", "phases", "endings", "servers"):
            (path / folder).mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(
            f"The run directory {path} cannot be written: {error.strerror}; set run.dir."
        ) from None
    except UnicodeEncodeError as error:
        raise UserError(
            f"The run directory {path} has characters that this locale ({error.encoding}) has not; set run.dir."
        ) from None
    return directory


def _lock(path: Path) -> int:
    """Keep others out of the directory `path` until this process ends, however it ends; the lock's
    descriptor."""
    descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    if not try_lock(descriptor):
        owner = os.pread(descriptor, 64, 0).decode().strip()
        os.close(descriptor)
        raise UserError(
            f"{path} is in use by process {owner}; stop that run first, or choose another run.name."
        )
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def _names_in(path: Path) -> list[str]:
    return os.listdir(path) if path.is_dir() else []


def stored_values(directory: RunDirectory) -> dict[str, Any]:
    """Returns the settings of the latest start. Raises UserError where they are damaged."""
    try:
        return json.loads(read_text(directory.config))["values"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{directory.config} is damaged; choose another run.name or remove the directory."
        ) from None


def _check_identity(directory: RunDirectory, stored: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    if told := differences(stored, values):
        which = "that value" if len(told) == 1 else "those values"
        raise UserError(
            f"{directory.path} belongs to another experiment: it was started with {'; with '.join(told)}; choose "
            f"another run.name or go back to {which}."
        )


def _check_steps(path: Path, trained: int, values: Mapping[str, Any]) -> None:
    steps = values["run"]["steps"]
    if trained > steps:
        raise UserError(
            f"run.steps is {steps}, but {path} has {trained} training steps behind it; set run.steps to at least "
            f"{trained}, or choose another run.name."
        )


def _check_never_saved(directory: RunDirectory, stored: Mapping[str, Any], last_row: int) -> None:
    """Rows without a checkpoint are those of a run that ended before its first one; else somebody removed it."""
    first_save = min(stored["checkpoint"]["every"], stored["run"]["steps"])
    if last_row >= first_save:
        raise UserError(
            f"{directory.metrics} has the steps up to {last_row}, but {directory.checkpoints} has no whole "
            "checkpoint to go on from: put it back, choose another run.name, or remove the directory."
        )


def _description(values: Mapping[str, Any], origins: Mapping[str, str]) -> dict[str, Any]:
    packages = {dist.name: dist.version for dist in distributions()}
    return {
        "values": dict(values),
        "origins": dict(origins),
        "command": list(sys.argv),
        "code": code_revision(Path(__file__).parent),
        "python": sys.version.split()[0],
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
    }


def code_revision(source: Path) -> dict[str, Any]:
    """Returns the git commit of the checkout that holds `source`, and whether files differ from it; commit None if
    there is none."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(source), *arguments],
                capture_output=True,
                text=True,
                timeout=30,
                check=False,
            )
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # an installed copy, perhaps inside somebody else's checkout
    if not git("ls-files", "--", "."):
        return {"commit": None, "modified": None}
    return {"commit": git("rev-parse", "HEAD"), "modified": bool(git("status", "--porcelain", "--", "."))}
