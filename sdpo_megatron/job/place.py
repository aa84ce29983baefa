"""Whether a job's nodes can see and write its run directory, and whether a run is free to be submitted."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sdpo_megatron.doctor.file_systems import file_system_of, nearest_existing
from sdpo_megatron.errors import ConfigError, UserError
from sdpo_megatron.job.description import JobDirectory
from sdpo_megatron.job.slurm import run_command
from sdpo_megatron.job.state import queued
from sdpo_megatron.run_dir.directory import RunDirectory, lock_owner, try_lock
from sdpo_megatron.terminal import script

NODE_LOCAL = ("/tmp", "/var/tmp", "/dev/shm", "/run")
"""What each node has of its own, the login node too."""
MOVE = "set run.dir to a directory that all nodes see"
IMAGES = ("--container-image", "--container")
"""Arguments of srun that may name a container's image by its path."""


def check_place(run: Path, nodes: int) -> str | None:
    """Returns what to say of the place of a run directory for a job on `nodes` nodes, None for nothing. Raises
    UserError where the directory cannot be written, or another node cannot see it."""
    there = nearest_existing(run)
    if not there.is_dir():
        raise UserError(f"{there} is a file, where a directory should be for the run: set run.dir.")
    system = file_system_of(there)
    if system.place == "memory":
        raise UserError(
            f"The run directory {run} is in this machine's memory ({system.kind} at {system.point}): {MOVE}."
        )
    # what is mounted there is judged by what it is
    for own in NODE_LOCAL:
        mounted = system.place == "network" or own in map(str, Path(system.point).parents)
        if there.is_relative_to(own) and not mounted:
            raise UserError(
                f"The run directory {run} is below {own}, of which each node has its own: {MOVE}."
            )
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(
            f"The run directory {run} cannot be made: you may not write into {there}; set run.dir."
        )
    if system.place == "local" and nodes > 1:
        return (
            f"{run.parent} is on {system.kind} at {system.point}, which looks like a disk of this machine: the "
            "job looks whether its nodes see it, and ends where one does not."
        )
    return None


def check_free(run: Path, own_job: str | None = None) -> None:
    """Raises UserError where a job other than `own_job`, or a process, has the run already."""
    number = JobDirectory(run / "job").number
    job = number.read_text(encoding="utf-8").strip() if number.is_file() else None
    if job is not None and job != own_job and (queue := queued(job)) is not None:
        state = f"waits ({queue.reason})" if queue.state == "PENDING" else f"is {queue.state.lower()}"
        raise UserError(
            f"{run} is job {job} already, which {state}: see {script('slurm/status.py', run)}, end it with "
            f"{script('slurm/stop.py', run)}, or choose another run.name."
        )
    if owner := lock_owner(RunDirectory(run)):
        raise UserError(
            f"{run} is in use by process {owner}; stop that run first, or choose another run.name."
        )


@contextmanager
def claimed(runs: Sequence[Path]) -> Iterator[None]:
    """Keeps others from submitting these runs meanwhile. Raises UserError where one is not free."""
    with ExitStack() as held:
        for run in runs:
            path = JobDirectory(run / "job").claim
            path.parent.mkdir(parents=True, exist_ok=True)
            file = held.enter_context(path.open("ab"))
            if not try_lock(file.fileno()):
                raise UserError(f"{run} is being submitted by another process; see what becomes of that.")
            # what somebody submitted while files were hashed
            check_free(run)
        yield


def check_images(srun_args: Sequence[str]) -> None:
    """Raises ConfigError for a container's image that is named by its whole path, and is not there."""
    for position, argument in enumerate(srun_args):
        flag, given, value = argument.partition("=")
        path = value if given else " ".join(srun_args[position + 1 : position + 2])
        if flag in IMAGES and path.startswith("/") and not Path(path).exists():
            raise ConfigError(
                f"hardware.srun_args: {flag} names {path}, which is not there: correct the path."
            )


def check_seen(directory: JobDirectory, hosts: Sequence[str]) -> None:
    """Asks all `hosts` of the job that this process is in whether they see its directory. Raises UserError where one
    does not, RunFailed where one does not answer."""
    if len(hosts) == 1:
        return
    script = 'test -r "$1" || echo "$SLURMD_NODENAME"'
    said = run_command(
        [
            *("srun", "--job-name=sees", "--overlap", "--mem=0", "--cpus-per-task=1", "--cpu-bind=none"),
            *(f"--nodes={len(hosts)}", f"--ntasks={len(hosts)}", "--ntasks-per-node=1"),
            *("sh", "-c", script, "sh", str(directory.description)),
        ]
    )
    if blind := sorted(said.split()):
        verb = "do" if len(blind) > 1 else "does"
        raise UserError(
            f"{', '.join(blind)} {verb} not see {directory.path.parent}, which must lie where all nodes see it: set "
            "run.dir."
        )
