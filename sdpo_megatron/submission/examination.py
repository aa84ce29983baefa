"""A short job that examines nodes of a partition: submitted, waited for, and cancelled where nobody waits any more."""

import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from sdpo_megatron.cluster.hardware import HardwareSettings
from sdpo_megatron.cluster.setup import setup_lines
from sdpo_megatron.cluster.steps import job_options
from sdpo_megatron.doctor.checks import Subject
from sdpo_megatron.doctor.findings import Finding, failure, from_json
from sdpo_megatron.doctor.node import answer_of_node, begun, write_subject
from sdpo_megatron.errors import RunFailed
from sdpo_megatron.files import write_atomically
from sdpo_megatron.job.reasons import text_of
from sdpo_megatron.job.slurm import hosts_of, is_unknown, run_command, squeue
from sdpo_megatron.launch.processes import wait_until
from sdpo_megatron.terminal import tell

PACKAGE = Path(__file__).resolve().parents[1]
MOST_NODES = 2
JOB_S = 300
"""The time limit of the job; it mostly takes half a minute."""
ENDING_S, SEEN_S = 30.0, 10.0
"""How long it may take to end behind its limit, and its last files to be seen here."""
POLL_S = 1.0
LONGEST_WORDS = 200
ENDS_WITHIN_S = 3.0
"""How long a job whose nodes have all answered may take before it is cancelled."""
NODE = "node"


@dataclass(frozen=True)
class Told:
    """What Slurm says of the job."""

    state: str
    reason: str
    hosts: tuple[str, ...]

    @property
    def waits(self) -> bool:
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")

    @property
    def runs(self) -> bool:
        return self.state in ("CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STAGE_OUT", "SIGNALING")


class Examination:
    """The job, whose files lie in a directory that its nodes see."""

    def __init__(self, hardware: HardwareSettings, directory: Path) -> None:
        nodes, limit_s = min(MOST_NODES, hardware.nodes), min(JOB_S, hardware.time_limit_s)
        self._limit_s = limit_s
        limit = f"00:{limit_s // 60:02d}:{limit_s % 60:02d}"
        self.hardware = hardware.model_copy(update={"nodes": nodes, "time_limit": limit})
        self.directory = directory
        self._number = ""

    @contextmanager
    def submitted(self, subject: Subject) -> Iterator[str]:
        """Submits it, and gives its number; on leaving it has ended. Raises RunFailed where Slurm refuses it."""
        (self.directory / "nodes").mkdir(parents=True)
        code = self.directory / "code" / PACKAGE.name
        shutil.copytree(PACKAGE, code, ignore=shutil.ignore_patterns("__pycache__"))
        write_subject(self.directory, subject)
        write_atomically(self.directory / "job.sh", self.script())
        try:
            said = run_command(["sbatch", "--parsable", str(self.directory / "job.sh")])
        except RunFailed as error:
            why = error.message.partition(" failed: ")[2] or error.message
            raise RunFailed(f"Slurm does not take the job: {why}") from None
        # a site may greet first
        self._number = said.strip().splitlines()[-1].partition(";")[0]
        try:
            yield self._number
        finally:
            self._cancel()

    def _cancel(self) -> None:
        try:
            run_command(["scancel", self._number])
        except RunFailed as error:
            # one that has ended is not there to be cancelled
            if not is_unknown(error) and "already complet" not in error.message:
                tell(f"warning: job {self._number} may go on for {self._limit_s} s: {error}", sys.stderr)

    def script(self) -> str:
        """Returns the batch script."""
        options = job_options(self.hardware, "doctor")
        for key in ("requeue", "signal"):
            del options[key]
        options |= {"no-requeue": "", "output": str(self.directory / "job.log")}
        nodes = self.hardware.nodes
        srun = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--mem=0"]
        srun += [f"--cpus-per-task={self.hardware.cpus_per_node}", "--cpu-bind=none", "--kill-on-bad-exit=0"]
        srun += [f"--output={self.directory / 'nodes' / '%N.log'}"]
        if "gpus-per-node" in options:
            srun.append(f"--gpus-per-node={options['gpus-per-node']}")
        program = [sys.executable, "-m", "sdpo_megatron.doctor.node", str(self.directory)]
        lines = [
            "#!/bin/bash",
            *(
                f"#SBATCH --{key}{f'={shlex.quote(value)}' if value else ''}"
                for key, value in options.items()
            ),
            *setup_lines(self.hardware, self.directory / "code"),
            'hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || hosts=$SLURMD_NODENAME',
            f"exec {shlex.join([*srun, *self.hardware.srun_args, *program])} $hosts",
        ]
        return "\n".join(lines) + "\n"

    def wait(self, queue_limit_s: float, announce: Callable[[str], None]) -> list[Finding]:
        """Returns what the nodes found; a node that has not answered is a failure by its name. `announce` is told in a
        line what is waited for.

        Raises RunFailed where the job has not started within `queue_limit_s`, or ends without a node."""
        begin, said = time.monotonic(), None
        while (told := self._told()).waits:
            if told.reason != said:
                said = told.reason
                announce(f"Job {self._number} waits{_because(said)}. Ctrl-C cancels it.")
            if time.monotonic() - begin > queue_limit_s:
                raise RunFailed(
                    f"Job {self._number} has not started within {queue_limit_s / 60:g} minutes{_because(told.reason)}, "
                    "and is cancelled: give it longer (--wait MINUTES), or take another partition (hardware.partition)."
                )
            time.sleep(POLL_S)
        if not told.hosts:
            raise RunFailed(
                f"Job {self._number} ended as {told.state} before it had a node{_because(told.reason)}."
            )
        where = ", ".join(told.hosts)
        announce(f"Job {self._number} examines {where}; it waited for {time.monotonic() - begin:.0f} s.")
        told = self._ended(told)
        return self._found(told)

    def _ended(self, told: Told) -> Told:
        """Returns what Slurm says once all nodes have answered, or none will any more."""
        hosts, end = told.hosts, time.monotonic() + self._limit_s + ENDING_S
        while told.runs and not self._all_answered(hosts) and time.monotonic() < end:
            time.sleep(POLL_S)
            told = self._told()
        if not told.runs:
            wait_until(lambda: self._all_answered(hosts), SEEN_S)
        end = time.monotonic() + ENDS_WITHIN_S
        while told.runs and time.monotonic() < end:
            time.sleep(POLL_S)
            told = self._told()
        return replace(told, hosts=hosts)

    def _all_answered(self, hosts: Sequence[str]) -> bool:
        # a listing, unlike a look for one name, does not have a network file system remember that it was absent
        there = {path.name for path in (self.directory / "nodes").iterdir()}
        return all(answer_of_node(self.directory, host).name in there for host in hosts)

    def _told(self) -> Told:
        lines = squeue(self._number, "%T|%r|%N", "--states=all") or [["UNKNOWN", "", ""]]
        state, reason, nodes = lines[-1]
        return Told(state, reason, tuple(hosts_of(nodes)) if nodes and not nodes.startswith("(") else ())

    # What came of it

    def _found(self, told: Told) -> list[Finding]:
        findings: list[Finding] = []
        for host in told.hosts:
            answer, so_far = answer_of_node(self.directory, host), begun(self.directory, host)
            if answer.is_file():
                findings += from_json(answer.read_bytes())
                continue
            if so_far.is_file():
                findings += from_json(so_far.read_bytes())
            findings.append(self._silent(host, told))
        return findings

    def _silent(self, host: str, told: Told) -> Finding:
        """Returns what is known of a node that has not answered."""
        has_begun = begun(self.directory, host).is_file()
        found = f"{host} has {'begun, but not' if has_begun else 'not'} answered"
        found += (
            f"; the job is {told.state}"
            if told.runs
            else f"; the job ended as {told.state}{_because(told.reason)}"
        )
        log, own = self.directory / "job.log", self.directory / "nodes" / f"{host}.log"
        if words := last_words(own) or last_words(log):
            found += f"; its log ends with: {words}"
            todo = f"see {own} and {log}"
        elif has_begun:
            todo = f"see whether it is up (sinfo --nodes={host}), or exclude it (hardware.sbatch_args)"
        else:
            todo = (
                f"name a directory that all nodes see by --dir: {self.directory} may be this machine's alone"
            )
        return replace(failure(NODE, found, todo), host=host)


def _because(reason: str) -> str:
    return "" if reason in ("", "None") else f" ({reason})"


def last_words(log: Path) -> str:
    """Returns the last line of a log; empty where there is none."""
    lines = [line for line in text_of(log).splitlines() if line.strip()]
    return " ".join(lines[-1].split())[:LONGEST_WORDS] if lines else ""
