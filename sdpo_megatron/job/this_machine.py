"""A job on this machine alone, in the place of Slurm: the same steps, as processes here, through submitit's
LocalExecutor."""

import contextlib
import importlib.util
import os
import shlex
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from sdpo_megatron.cluster.hardware import HardwareSettings
from sdpo_megatron.cluster.steps import Step
from sdpo_megatron.errors import RunFailed, UserError
from sdpo_megatron.files import write_atomically
from sdpo_megatron.job import keeper
from sdpo_megatron.job.description import JobDirectory
from sdpo_megatron.launch.processes import ON_LOOPBACK, ChildProcess, Guard

LOCAL = "local-"
"""What the numbers of such jobs begin with."""
REQUEUE = 144
"""The exit code by which submitit's LocalExecutor starts a job again."""
LEAVES_WITHIN_S = 30.0
"""How long the other tasks of a step may take to end when one of them failed, as srun has it."""


class ThisMachine:
    """The job that this process is the program of. Makes a scheduler.Scheduler."""

    hosts = ("127.0.0.1",)

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Raises UserError where it was not started by LocalExecutor."""
        try:
            self.job = int(environment["SUBMITIT_LOCAL_JOB_ID"])
            self._ends = time.monotonic() + float(environment["SUBMITIT_LOCAL_TIMEOUT_S"])
        except KeyError as error:
            raise UserError(f"{error.args[0]} is not set: use slurm/submit.py with --local.") from None
        self._guard = Guard()

    def start(self, step: Step, log: Path) -> "LocalStep":
        return LocalStep(step, self._guard)

    def end_steps(self) -> None:
        """The guard of the process that was killed has done it."""

    def time_left_s(self) -> float:
        return self._ends - time.monotonic()

    def preemption_grace_s(self) -> None:
        return None

    def is_cancelled(self) -> bool:
        return False

    def come_back(self) -> int:
        return REQUEUE


class LocalStep:
    """The tasks of a step, as processes with the variables that srun would set. Makes a scheduler.RunningStep."""

    def __init__(self, step: Step, guard: Guard) -> None:
        self._failed_at: float | None = None
        self._tasks: list[ChildProcess] = []
        for task in range(step.tasks_per_node):
            number = {"SLURM_PROCID": task, "SLURM_LOCALID": task, "SLURM_NTASKS": step.tasks_per_node}
            environment = os.environ | ON_LOOPBACK | {key: str(value) for key, value in number.items()}
            log = Path(step.log.replace("%t", str(task)))
            child = ChildProcess(step.program, environment | {"PYTHONUNBUFFERED": "1"}, log, guard=guard)
            self._tasks.append(child)

    def exit_code(self) -> int | None:
        codes = [child.exit_code() for child in self._tasks]
        ended = [code if code >= 0 else 128 - code for code in codes if code is not None]
        worst = max(ended, default=0)
        if len(ended) == len(codes):
            return worst
        if worst:
            # who has lost another one mostly sees that by itself
            self._failed_at = self._failed_at or time.monotonic()
            if time.monotonic() - self._failed_at > LEAVES_WITHIN_S:
                for child in self._tasks:
                    child.kill()
        return None

    def send(self, number: signal.Signals) -> bool:
        for child in self._tasks:
            if not child.ended():
                os.kill(child.pid, number)
        return True

    def end(self) -> None:
        for child in self._tasks:
            child.end()


def check_alone(hardware: HardwareSettings) -> None:
    """Raises UserError for a job that is more than this machine's, or without submitit."""
    if hardware.nodes != 1:
        raise UserError(
            f"--local has this machine alone, and hardware.nodes is {hardware.nodes}: set hardware.nodes=1, and "
            "hardware.placement=colocated or split_node."
        )
    check_submitit()


def check_submitit() -> None:
    """Raises UserError where submitit is not installed."""
    if importlib.util.find_spec("submitit") is None:
        raise UserError("submitit is not installed; run: pip install -e '.[slurm]'")


def start_here(hardware: HardwareSettings, directory: JobDirectory, run: Path) -> str:
    """Has submitit run the job in a session of its own, which goes on when this process ends; returns the number by
    which `task_of` finds it."""
    import submitit

    shell = directory.path / "here.sh"
    # as in a job of Slurm: bash, and the lines in front of the job's program
    lines = [f"source {shlex.quote(str(directory.setup))}", f'exec {shlex.quote(sys.executable)} "$@"']
    write_atomically(shell, "\n".join(lines) + "\n")
    executor = submitit.LocalExecutor(
        folder=directory.path / "submitit", python=shlex.join(["bash", str(shell)])
    )
    executor.update_parameters(
        timeout_min=hardware.time_limit_s / 60,
        signal_delay_s=round(hardware.grace_s),
        gpus_per_node=hardware.gpus_per_node,
        stderr_to_stdout=True,
    )
    receiver, sender = os.pipe()
    if (child := os.fork()) == 0:
        # the signals of a terminal are not for it
        os.setsid()
        os.write(sender, executor.submit(keeper.in_local_job, str(run)).job_id.encode())
        os._exit(0)
    os.close(sender)
    with os.fdopen(receiver) as told:
        number = told.read()
    os.waitpid(child, 0)
    if not number:
        raise RunFailed(f"submitit did not start the job; see {directory.path / 'submitit'}.")
    return f"{LOCAL}{number}"


def runs_here(number: str) -> bool:
    """Returns whether a job that was started here has not ended."""
    return bool(_processes(number))


def task_of(number: str) -> psutil.Process | None:
    """Returns the process that has a job that was started here make its attempts, None where there is none now."""
    with contextlib.suppress(psutil.Error):
        return next((one for one in _processes(number) if "submitit.core._submit" in one.cmdline()), None)
    return None


def stop_here(number: str) -> None:
    """Has a job that was started here save and end; where nothing is made yet, it just ends."""
    task = task_of(number)
    for process in [task] if task is not None else reversed(_processes(number)):
        with contextlib.suppress(psutil.Error):
            process.terminate()


def _processes(number: str) -> list[psutil.Process]:
    """Returns the job's own, of which the first is submitit's."""
    with contextlib.suppress(psutil.Error):
        first = psutil.Process(int(number.removeprefix(LOCAL)))
        # the number may be another's by now
        if "submitit.local" in " ".join(first.cmdline()) and first.status() != psutil.STATUS_ZOMBIE:
            return [first, *first.children(recursive=True)]
    return []
