"""Slurm's commands, as far as a job asks them: each in one line of error, and within a limit."""

import math
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from sdpo_megatron.cluster.hardware import seconds_of
from sdpo_megatron.cluster.steps import Step
from sdpo_megatron.errors import RunFailed, UserError
from sdpo_megatron.job.task import job_name
from sdpo_megatron.terminal import tell

COMMAND_LIMIT_S = 60.0
"""How long one may take: a controller may be busy."""


def run_command(command: Sequence[str]) -> str:
    """Returns what `command` prints. Raises RunFailed where it fails, is missing, or takes longer."""
    shown = " ".join(command)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_LIMIT_S, check=False)
    except FileNotFoundError:
        raise RunFailed(
            f"There is no program {command[0]} on PATH; is this a node of a Slurm cluster?"
        ) from None
    except subprocess.TimeoutExpired:
        raise RunFailed(f"{shown} did not answer within {COMMAND_LIMIT_S:g} s.") from None
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise RunFailed(f"{shown} failed: {said}")
    return done.stdout


def is_unknown(error: RunFailed) -> bool:
    """Returns whether a command failed since Slurm knows the job no more, as some time after its end."""
    return "Invalid job id" in error.message


def squeue(job: str, fields: str, *options: str) -> list[list[str]]:
    """Returns the `fields` (such as %T|%r) of each line that squeue prints of a job; none where Slurm knows it no more.
    Raises RunFailed where it does not answer."""
    try:
        # steps in a partition that the site hides are not shown otherwise
        said = run_command(["squeue", "--all", "--noheader", f"--job={job}", f"--format={fields}", *options])
    except RunFailed as error:
        if not is_unknown(error):
            raise
        return []
    # a reason, or the name of a step, may have bars of its own
    return [line.split("|", fields.count("|")) for line in said.strip().splitlines()]


def hosts_of(node_list: str) -> list[str]:
    """Returns the names in Slurm's `node_list`, such as n[1-3], in its order."""
    return run_command(["scontrol", "show", "hostnames", node_list]).split()


class SlurmJob:
    """The job that this process is the batch script of. Makes a scheduler.Scheduler."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Raises UserError outside of a job, RunFailed where Slurm does not answer."""
        if "SLURM_JOB_ID" not in environment:
            raise UserError("SLURM_JOB_ID is not set: this runs in a job of Slurm; see slurm/submit.py.")
        self.job, self._name = int(environment["SLURM_JOB_ID"]), job_name(environment)
        self.hosts = hosts_of(environment["SLURM_JOB_NODELIST"])
        self._partition = environment.get("SLURM_JOB_PARTITION", "")
        self._restarts = environment.get("SLURM_RESTART_COUNT", "0")

    def start(self, step: Step, log: Path) -> "SlurmStep":
        return SlurmStep(step, self._name, log)

    def end_steps(self) -> None:
        try:
            for step in steps_of(self._name):
                signal_step(step, signal.SIGKILL)
        except RunFailed as error:
            # they end with the job at the latest
            tell(f"warning: {error.message}", sys.stderr)

    def time_left_s(self) -> float:
        try:
            return seconds_of(squeue(self._name, "%L")[-1][0])
        except (RunFailed, IndexError):
            return math.inf

    def preemption_grace_s(self) -> float | None:
        values = _shown("partition", self._partition)
        takes = values.get("PreemptMode", "OFF") not in ("OFF", "SUSPEND", "GANG")
        return float(values["GraceTime"]) if takes and values.get("GraceTime", "").isdigit() else None

    def is_cancelled(self) -> bool:
        """Slurm does not say so of a job whose script still runs: but it is ending it, without having it come back, and
        not since its time is over."""
        values = _shown("job", self._name)
        ends = values.get("JobState") in ("COMPLETING", "CANCELLED")
        return ends and values.get("Restarts") == self._restarts and values.get("Reason") != "TimeLimit"

    def come_back(self) -> int:
        """Raises RunFailed where Slurm does not answer."""
        run_command(["scontrol", "requeue", self._name])
        return 0


def _shown(what: str, name: str) -> dict[str, str]:
    """Returns what scontrol shows of a job or a partition, by Slurm's keys; nothing where it does not answer."""
    try:
        said = run_command(["scontrol", "--all", "--oneliner", "show", what, name])
    except RunFailed:
        return {}
    return dict(word.split("=", 1) for word in said.split() if "=" in word)


def steps_of(job: str) -> dict[str, str]:
    """Returns the names of the job's steps that run, by JOB.STEP. Raises RunFailed where Slurm does not answer."""
    steps = squeue(job, "%i|%j", "--steps")
    return {number: name for number, name in steps if not number.endswith((".batch", ".extern"))}


def signal_step(step: str, number: signal.Signals) -> None:
    """Signals the tasks of JOB.STEP. Raises RunFailed where Slurm does not answer."""
    try:
        run_command(["scancel", f"--signal={number.name.removeprefix('SIG')}", step])
    except RunFailed as error:
        # said of the job's nodes on which the step has no task; the others have the signal
        if not is_unknown(error):
            raise


class SlurmStep:
    """A step of the job that this process is the batch script of. Makes a scheduler.RunningStep."""

    def __init__(self, step: Step, job: str, log: Path) -> None:
        """Starts it. What srun itself says goes to the end of `log`."""
        self._name, self._job = step.name, job
        with log.open("ab") as file:
            self._srun = subprocess.Popen(
                step.command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                # a signal to the batch shell's group is not one to srun
                start_new_session=True,
            )

    def exit_code(self) -> int | None:
        code = self._srun.poll()
        return code if code is None or code >= 0 else 128 - code

    def send(self, number: signal.Signals) -> bool:
        try:
            # srun does not say its step's number; there is none before it begins and after it has ended
            steps = [step for step, name in steps_of(self._job).items() if name == self._name]
            if not steps:
                return False
            signal_step(steps[-1], number)
        except RunFailed as error:
            tell(f"warning: {error.message}", sys.stderr)
            return False
        return True

    def end(self) -> None:
        self.send(signal.SIGKILL)
        if self._srun.poll() is None:
            os.kill(self._srun.pid, signal.SIGKILL)
        self._srun.wait()
