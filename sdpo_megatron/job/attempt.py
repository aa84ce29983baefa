"""One attempt of a job: starts its steps, hands a wish to stop on, ends them together, and says what follows.

It runs once, in the batch shell on the first node. Slurm signals that shell alone (`--signal=B:USR2`): what is handed
on is SIGTERM to the trainer, which saves. A signal only sets a flag here."""

import secrets
import signal
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from sdpo_megatron.cluster.hardware import HardwareSettings
from sdpo_megatron.cluster.layout import Layout, plan_layout
from sdpo_megatron.cluster.steps import TRAINER, Step, server_step, trainer_step
from sdpo_megatron.config import ParallelSettings, ServerSettings
from sdpo_megatron.files import write_private
from sdpo_megatron.job.description import Job, JobDirectory
from sdpo_megatron.job.fence import Superseded, is_superseded
from sdpo_megatron.job.measured import Clock
from sdpo_megatron.job.reasons import Reason, reason_in, server_reason
from sdpo_megatron.job.requeue import Attempt, Why
from sdpo_megatron.job.scheduler import RunningStep, Scheduler
from sdpo_megatron.launch.hangs import HangWatch, Seen, Watched
from sdpo_megatron.launch.processes import wait_until
from sdpo_megatron.launch.verdict import STOPPED
from sdpo_megatron.run_dir.directory import RunDirectory
from sdpo_megatron.run_dir.phases import STACKS_ASKED_BY
from sdpo_megatron.terminal import tell

POLL_S = 0.5
ANSWERS_S = 10.0
"""How long ranks have to say what they are at: a shared file system shows it late."""
HUNG = 137
"""The exit code of a trainer that had to be killed."""


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """What the job is given."""

    job: int
    number: int
    """Of the attempt, from 0."""
    hosts: Sequence[str]


class Signals:
    """The first signal that asks to stop, and why."""

    WHY: Mapping[int, Why] = {
        signal.SIGUSR2: "preempted",
        signal.SIGTERM: "asked",
        signal.SIGINT: "asked",
        signal.SIGHUP: "asked",
    }

    def __init__(self) -> None:
        self.why: Why | None = None

    def install(self) -> None:
        for number in self.WHY:
            signal.signal(number, self.handle)

    def handle(self, number: int, frame: FrameType | None) -> None:
        # Slurm sends USR2 first where it can, and TERM behind it
        self.why = self.why or self.WHY[number]

    def comes_within(self, seconds: float) -> Why | None:
        """Returns why to stop as soon as that is asked, None where it is not within so long."""
        wait_until(lambda: self.why == "asked", seconds)
        return self.why


def plan_steps(
    job: Job,
    allocation: Allocation,
    parallel: ParallelSettings,
    server: ServerSettings,
    directory: JobDirectory,
    logs: Path,
) -> tuple[Layout, list[Step]]:
    """Returns the layout and the steps of an attempt: the servers, and the trainer as the last one."""
    layout = plan_layout(job.hardware, parallel, server.tp, allocation.job, allocation.number)
    fence = (str(directory.begun), str(allocation.number))
    common = {"python": job.python, "logs": logs, "fence": fence}
    hosts, arguments = allocation.hosts, [*job.arguments, *shared_memory(job.hardware, server)]
    servers = [
        server_step(
            *(place, job.hardware, hosts),
            arguments=arguments,
            key_file=directory.key,
            world_size=len(layout.ranks),
            **common,
        )
        for place in layout.servers
    ]
    urls = f"server.urls=[{','.join(layout.urls(hosts))}]"
    told = [
        *(*arguments, urls, f"server.api_key_file={directory.key}"),
        # saving is compared with what there is
        f"run.stop_grace_s={job.hardware.grace_s:g}",
    ]
    return layout, [*servers, trainer_step(layout, job.hardware, hosts, arguments=told, **common)]


def shared_memory(hardware: HardwareSettings, server: ServerSettings) -> list[str]:
    """Returns the argument by which servers on the trainer's GPUs give it their memory, unless a setting says
    otherwise."""
    shares = hardware.placement == "colocated" and hardware.gpus_per_node > 0
    said = "release_memory" in server.model_fields_set
    return ["server.release_memory=true"] if shares and not said else []


class AttemptRun:
    """Runs the steps of one attempt until the trainer has ended."""

    def __init__(
        self,
        scheduler: Scheduler,
        signals: Signals,
        run: Path,
        logs: Path,
        *,
        number: int,
        grace_s: float,
        hang_timeout_s: float,
        watched: Mapping[int, Watched],
    ) -> None:
        """`grace_s`: how long the trainer may take to save once it is asked to stop, where that was not measured to
        take longer. `watched`: the ranks, and where they are."""
        self._scheduler, self._directory, self._logs = scheduler, JobDirectory(run / "job"), logs
        self._number, self._grace_s, self._watched = number, grace_s, watched
        self._clock = Clock(scheduler, RunDirectory(run).metrics)
        self._hangs = HangWatch(
            RunDirectory(run), hang_timeout_s, self._ask_for_stacks, answers_within_s=ANSWERS_S
        )
        self._signals = signals
        self._running: dict[str, RunningStep] = {}

    def run(self, steps: Sequence[Step], steps_behind: Callable[[], int]) -> Attempt:
        """Returns how it ended; `steps_behind` says how many training steps are saved. Raises Superseded where another
        attempt has begun meanwhile."""
        # of an attempt whose node was lost
        self._directory.key.unlink(missing_ok=True)
        write_private(self._directory.key, secrets.token_hex(32))
        try:
            for step in steps:
                self._running[step.name] = self._scheduler.start(step, self._logs / f"srun_{step.name}.log")
            code, reason = self._watch()
        finally:
            for running in self._running.values():
                running.end()
            if not is_superseded(self._directory.begun, self._number):
                self._directory.key.unlink(missing_ok=True)
        return self._ending(code, reason, steps_behind())

    def _watch(self) -> tuple[int, str]:
        """Returns the exit code of what ended the attempt, and the reason where it is none of the trainer's."""
        trainer, deadline, reason, told = self._running[TRAINER], None, "", False
        while (code := trainer.exit_code()) is None:
            if is_superseded(self._directory.begun, self._number):
                raise Superseded(f"attempt {self._number} ends: another one of this job has begun.")
            if deadline is None:
                if self._hangs_for_too_long():
                    return HUNG, self._hangs.hang_in_short
                reason = self._lost_server()
                if self._clock.is_over():
                    self._signals.why = self._signals.why or "preempted"
                if self._signals.why is not None or reason:
                    deadline = time.monotonic() + max(self._grace_s, self._clock.stop_takes_s)
            if deadline is not None:
                # who is only starting has no ear yet
                told = told or trainer.send(signal.SIGTERM)
                if time.monotonic() > deadline:
                    return (
                        HUNG,
                        reason or f"the ranks did not leave within hardware.grace_s={self._grace_s:g} s",
                    )
            time.sleep(POLL_S)
        return code, reason

    def _hangs_for_too_long(self) -> bool:
        if (said := self._hangs.look(self._watched)) is not None:
            tell(said)
        return self._hangs.is_overdue

    def _ask_for_stacks(self, seen: Collection[Seen]) -> None:
        # all of the step's tasks get the signal, and it ends who does not expect it yet
        if len(seen) == len(self._watched):
            self._running[TRAINER].send(STACKS_ASKED_BY)

    def _lost_server(self) -> str:
        for name, running in self._running.items():
            if name != TRAINER and (code := running.exit_code()) is not None:
                return server_reason(self._logs, name, code)
        return ""

    def _ending(self, code: int, reason: str, steps: int) -> Attempt:
        if code == 0:
            return Attempt(why="finished", steps=steps)
        if reason:
            return Attempt(why="failed", steps=steps, exit_code=code, reason=reason)
        found = reason_in(self._logs)
        if code in STOPPED and (self._signals.why is not None or found is None):
            return Attempt(why=self._signals.why or "asked", steps=steps, exit_code=code)
        found = found or Reason(f"the trainer ended with exit code {code}", code)
        return Attempt(why="failed", steps=steps, exit_code=found.exit_code, reason=found.text)
