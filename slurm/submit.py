"""Submits a run to Slurm: checked before it queues, and it comes back by itself until it is finished.

    python slurm/submit.py yaml/x.yaml yaml/hardware/CLUSTER.yaml [section.key=value ...]

A file that begins with `hardware:` is of hardware, and so is what begins with `hardware.`: the rest is of the
experiment. With --sweep it is an array of jobs, a run each.
"""

import functools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from sdpo_megatron.cluster.hardware import HardwareSettings, is_hardware, load_hardware
from sdpo_megatron.config import Config, load_config
from sdpo_megatron.errors import ConfigError
from sdpo_megatron.job.place import check_images, claimed
from sdpo_megatron.job.state import write_number
from sdpo_megatron.job.task import job_name
from sdpo_megatron.job.this_machine import check_alone, start_here
from sdpo_megatron.preflight.checked import parse_arguments, settings_parser
from sdpo_megatron.submission.dry_run import show
from sdpo_megatron.submission.examined import offer
from sdpo_megatron.submission.run import check_submission, lay_down, read_all, send
from sdpo_megatron.submission.site import check_allocation, check_site, check_tools
from sdpo_megatron.submission.sweep import Combination, combinations
from sdpo_megatron.terminal import reported, script, tell

SUBMIT = settings_parser(
    "python slurm/submit.py",
    __doc__ or "",
    "All keys of hardware, with their defaults, are in sdpo_megatron/cluster/hardware.py.",
)
SUBMIT.add_argument(
    "--sweep",
    action="append",
    default=[],
    help="section.key=a,b,c: a run for each value; of several, for all combinations",
)
SUBMIT.add_argument("--local", action="store_true", help="run the job on this machine, without Slurm")
SUBMIT.add_argument(
    "--dry-run", action="store_true", help="show what would run where, by which commands; submit nothing"
)
SUBMIT.add_argument(
    "--prepare",
    action="store_true",
    help="do all but submitting, and print the run directory; slurm/train.sbatch calls it",
)


@dataclass(frozen=True)
class Request:
    experiment: tuple[str, ...]
    """Arguments of sdpo_megatron.train, those that all runs have."""
    hardware: HardwareSettings
    hardware_arguments: tuple[str, ...]
    """What it was read from."""
    sweeps: tuple[str, ...]
    """section.key=a,b,c each."""
    dry_run: bool
    prepare: bool
    local: bool

    def name(self) -> str:
        """Returns the name of the run, or what those of a sweep have in common. Raises ConfigError."""
        first = self._combinations()[0].overrides if self.sweeps else ()
        return _load([*self.experiment, *first]).run.name

    def runs(self) -> list[tuple[str, ...]]:
        """Returns the arguments of each run. Raises ConfigError, also for a setting of the last of them."""
        if not self.sweeps:
            return [self.experiment]
        base = self.name()
        runs = [
            (*self.experiment, *one.overrides, f"run.name={one.name(base)}") for one in self._combinations()
        ]
        for run in runs:
            _load(run)
        return runs

    def _combinations(self) -> list[Combination]:
        return combinations(self.sweeps, parse_arguments(self.experiment).overrides)


def _load(experiment: Sequence[str]) -> Config:
    arguments = parse_arguments(experiment)
    return load_config(arguments.files, arguments.overrides)[0]


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 submitted or shown, 2 the user's to mend, 1 Slurm does not take it."""
    return reported(lambda: answer(parse(argv)))


def answer(request: Request) -> int:
    if request.dry_run:
        preview(request)
    elif request.prepare:
        prepare(request)
    elif request.local:
        start(request)
    else:
        submit(request)
    return 0


def parse(argv: Sequence[str]) -> Request:
    """Raises ConfigError."""
    arguments = parse_arguments(argv, SUBMIT)
    files = [file for file in arguments.files if is_hardware(file)]
    overrides = [override for override in arguments.overrides if override.startswith("hardware.")]
    experiment = tuple(argument for argument in arguments.arguments if argument not in {*files, *overrides})
    if len(files) == len(arguments.files):
        raise ConfigError(
            "no experiment: give its YAML file beside that of hardware, such as yaml/demo_cpu.yaml."
        )
    if not files and not overrides and not arguments.local:
        raise ConfigError(
            "no hardware: give a YAML file of what the job is given, such as yaml/hardware/h100_colocated.yaml, or "
            "hardware.nodes=1."
        )
    if (arguments.prepare or arguments.local) and arguments.sweep:
        flag = "--prepare" if arguments.prepare else "--local"
        raise ConfigError(f"{flag} is for one run, and --sweep makes several: leave one of them out.")
    hardware = load_hardware(files, overrides)
    # where it will run there are GPUs, whatever there is here
    device = ("run.device=cuda",) if hardware.gpus_per_node else ("run.device=cpu",)
    return Request(
        (*experiment, *device),
        hardware,
        (*files, *overrides),
        tuple(arguments.sweep),
        arguments.dry_run,
        arguments.prepare,
        arguments.local,
    )


def preview(request: Request) -> None:
    runs = request.runs()
    if request.sweeps:
        tell(f"An array of {len(runs)} {'run' if len(runs) == 1 else 'runs'}:")
        for run in runs:
            tell(f"    {_load(run).run.name}")
        tell("\nThe first of them:\n")
    show(runs[0], request.hardware)


def submit(request: Request) -> None:
    """Checks everything, lays each job into its run directory and submits them. Raises UserError, or RunFailed where
    Slurm does not take it."""
    check_tools()
    check_images(request.hardware.srun_args)
    runs = request.runs()
    # what is to be said of all runs of a sweep is said once
    announce = functools.cache(tell)
    check_site(request.hardware, announce)
    submissions = [check_submission(run, request.hardware, announce) for run in runs]
    inputs = read_all(submissions, announce)
    with claimed([submission.run for submission in submissions]):
        for submission in submissions:
            lay_down(submission, request.hardware, inputs)
        name, first = request.name(), submissions[0]
        # what the jobs of an array share lies beside the runs
        folder = first.run.parent / f"{name}.sweep" if request.sweeps else first.directory.path
        numbers = send(name, request.hardware, submissions, folder / "submitit")
        for submission, number in zip(submissions, numbers, strict=True):
            write_number(submission.directory, number)
            tell(f"Submitted as job {number}. Run directory: {submission.run}, with logs in logs/latest")
    runs_of = [submission.run for submission in submissions]
    tell(
        f"State: {script('slurm/status.py', *runs_of)}\nTo stop one, saved: {script('slurm/stop.py', runs_of[0])}"
    )
    if line := offer(request.hardware.partition, request.hardware_arguments):
        tell(line)


def start(request: Request) -> None:
    """Starts the run's job on this machine, where it goes on when this process ends. Raises UserError."""
    check_alone(request.hardware)
    submission = check_submission(request.experiment, request.hardware, tell, here=True)
    inputs = read_all([submission], tell)
    with claimed([submission.run]):
        lay_down(submission, request.hardware, inputs)
        number = start_here(request.hardware, submission.directory, submission.run)
        write_number(submission.directory, number)
    tell(
        f"Started as {number}. Run directory: {submission.run}, with logs in logs/latest\nState: "
        f"{script('slurm/status.py', submission.run)}\nTo stop it, saved: {script('slurm/stop.py', submission.run)}"
    )


def prepare(request: Request) -> None:
    """Does all but submitting; within a job, which then is the run's. Says on standard error what there is to say, and
    the run directory on standard output."""
    own_job = job_name(os.environ) if "SLURM_JOB_ID" in os.environ else None
    if own_job is not None:
        check_allocation(os.environ, request.hardware)
    check_images(request.hardware.srun_args)
    submission = check_submission(request.experiment, request.hardware, _say, own_job)
    lay_down(submission, request.hardware, read_all([submission], _say))
    if own_job is not None:
        write_number(submission.directory, own_job)
    tell(str(submission.run))


def _say(line: str) -> None:
    tell(line, sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
