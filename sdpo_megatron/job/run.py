"""One attempt of a job: python -m sdpo_megatron.job.run [--local] RUN_DIRECTORY. Afterwards the job comes back where
that makes sense."""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sdpo_megatron.config import load_config
from sdpo_megatron.errors import EXIT_FAILED, EXIT_USER_ERROR, RunFailed, UserError
from sdpo_megatron.job.attempt import Allocation, AttemptRun, Signals, plan_steps
from sdpo_megatron.job.description import (
    Job,
    JobDirectory,
    begin_attempt,
    is_asked_to_stop,
    lost_attempts,
    read_job,
    write_attempts,
)
from sdpo_megatron.job.fence import Superseded, wait_for_earlier
from sdpo_megatron.job.inputs import check_inputs, read_inputs
from sdpo_megatron.job.place import check_seen
from sdpo_megatron.job.requeue import Attempt, decide
from sdpo_megatron.job.scheduler import Scheduler
from sdpo_megatron.job.slurm import SlurmJob
from sdpo_megatron.job.this_machine import ThisMachine
from sdpo_megatron.launch.hangs import Watched
from sdpo_megatron.preflight.checked import parse_arguments
from sdpo_megatron.run_dir.checkpoint_files import newest_checkpoint
from sdpo_megatron.run_dir.directory import RunDirectory
from sdpo_megatron.terminal import reported, tell

HANG_TIMEOUT_S = 30.0
ASKS, ASKED_EACH_S = 20, 30.0
"""How often Slurm is asked to have the job come back, where it does not answer."""


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 where the run is finished, or comes back."""
    return reported(lambda: run_attempt(Path(argv[-1]), scheduler_of(argv)))


def after_loss(argv: Sequence[str], reason: str) -> int:
    """Does what follows where the process that made an attempt was killed: returns the exit code."""
    return reported(lambda: end_lost_attempt(Path(argv[-1]), scheduler_of(argv), reason))


def scheduler_of(argv: Sequence[str]) -> Scheduler:
    return ThisMachine(os.environ) if "--local" in argv else SlurmJob(os.environ)


def run_attempt(run: Path, scheduler: Scheduler) -> int:
    directory, signals = JobDirectory(run / "job"), Signals()
    signals.install()
    job = read_job(directory)
    if is_asked_to_stop(directory):
        tell("Asked to stop before it came back: submit it again to go on.", sys.stderr)
        return EXIT_FAILED
    attempts = begin_attempt(directory, steps_behind(run), scheduler.job)
    allocation = Allocation(job=scheduler.job, number=len(attempts), hosts=scheduler.hosts)
    logs = attempt_logs(run, allocation.number)
    tell(
        f"Attempt {allocation.number} of job {allocation.job} on {', '.join(allocation.hosts)}, with the package in "
        f"{Path(__file__).parents[2]}. Logs: {logs}"
    )
    try:
        ended = make_attempt(job, allocation, scheduler, signals, run, logs)
    except Superseded as error:
        # what is to be written is the newer attempt's
        tell(f"stopped: {error}", sys.stderr)
        return EXIT_FAILED
    except (RunFailed, UserError) as error:
        code = EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAILED
        ended = Attempt(why="failed", steps=steps_behind(run), exit_code=code, reason=error.message)
    return follow(directory, job, scheduler, signals, [*attempts, replace(ended, job=scheduler.job)])


def end_lost_attempt(run: Path, scheduler: Scheduler, reason: str) -> int:
    directory, signals = JobDirectory(run / "job"), Signals()
    signals.install()
    scheduler.end_steps()
    attempts = lost_attempts(directory, steps_behind(run), scheduler.job, reason)
    return follow(directory, read_job(directory), scheduler, signals, attempts)


def follow(
    directory: JobDirectory, job: Job, scheduler: Scheduler, signals: Signals, attempts: list[Attempt]
) -> int:
    """Notes how the last of the attempts ended, and has the job come back where that makes sense."""
    ended = attempts[-1]
    # Slurm takes a requeue of what somebody has cancelled
    if ended.why in ("preempted", "failed") and (is_asked_to_stop(directory) or scheduler.is_cancelled()):
        ended = attempts[-1] = replace(ended, why="asked")
    write_attempts(directory, attempts)
    verdict = decide(attempts, job.hardware.max_requeues)
    tell(verdict.line)
    if not verdict.requeue:
        return 0 if ended.why == "finished" else ended.exit_code or EXIT_FAILED
    if signals.comes_within(verdict.pause_s) == "asked":
        write_attempts(directory, [*attempts[:-1], replace(ended, why="asked")])
        tell("Asked to stop: it does not come back.")
        return EXIT_FAILED
    return come_back(scheduler)


def make_attempt(
    job: Job, allocation: Allocation, scheduler: Scheduler, signals: Signals, run: Path, logs: Path
) -> Attempt:
    wait_for_earlier(RunDirectory(run))
    RunDirectory(run).forget_earlier_start()
    arguments = parse_arguments(job.arguments)
    config, _ = load_config(arguments.files, arguments.overrides)
    directory = JobDirectory(run / "job")
    layout, steps = plan_steps(job, allocation, config.parallel, config.server, directory, logs)
    patience = config.run.hang_timeout_s
    running = AttemptRun(
        *(scheduler, signals, run, logs),
        number=allocation.number,
        grace_s=job.hardware.grace_s,
        hang_timeout_s=HANG_TIMEOUT_S if patience is None else patience,
        watched={place.rank: Watched(f"on {allocation.hosts[place.node]}") for place in layout.ranks},
    )
    check_inputs(read_inputs(directory.inputs))
    check_seen(directory, allocation.hosts)
    return running.run(steps, lambda: steps_behind(run))


def come_back(scheduler: Scheduler) -> int:
    for asked in range(ASKS):
        try:
            return scheduler.come_back()
        except RunFailed as error:
            tell(f"warning: {error.message}; {ASKS - asked - 1} further tries.", sys.stderr)
            time.sleep(ASKED_EACH_S)
    return EXIT_FAILED


def attempt_logs(run: Path, number: int) -> Path:
    """Makes the directory of an attempt's logs, to which `logs/latest` leads."""
    logs = run / "logs" / f"attempt_{number:03d}"
    logs.mkdir(parents=True, exist_ok=True)
    link = run / "logs" / ".latest"
    link.unlink(missing_ok=True)
    link.symlink_to(logs.name)
    link.rename(run / "logs" / "latest")
    return logs


def steps_behind(run: Path) -> int:
    newest = newest_checkpoint(RunDirectory(run).checkpoints)
    return 0 if newest is None else int(newest.name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
