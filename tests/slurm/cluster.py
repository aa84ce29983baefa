"""A real Slurm cluster of four nodes on this machine, for tests; needs root.

    python -m tests.slurm.cluster up | down | status
    python -m tests.slurm.cluster kill | start | cut | heal NODE
    python -m tests.slurm.cluster run COMMAND ...     as on a login node: sbatch, squeue, a program that submits

There is one at a time. That of a test process ends with it, also by kill -9.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from tests.slurm import machines
from tests.slurm.lock import LockedError, last_root, take_lock
from tests.slurm.slurm_conf import NODES, write_settings

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAMS = ("slurmctld", "slurmd", "squeue", "munged", "ip", "nsenter", "unshare", "setpriv")
PACKAGES = "slurmctld slurmd slurm-client munge iproute2 util-linux"


class ClusterError(Exception):
    """The cluster is not up, refused something, or did not do what was waited for."""


def what_is_missing() -> str | None:
    """Why there can be no cluster here, with what to do about it; None where there can be one."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    absent = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install {PACKAGES} (.ci/run does it, and starts no service)"
    probe = [*machines.UNSHARE, "ip", "link", "add", "name", "probe", "type", "bridge"]
    done = subprocess.run(probe, capture_output=True, text=True, env=os.environ | {"PATH": path})
    if done.returncode:
        return f"no namespaces of its own ({done.stderr.strip()}): needs root, in a container --privileged"
    return None


class Cluster:
    """The cluster whose files lie below `root`, an absolute path. Its nodes see the same files as this machine, but
    for /tmp and /dev/shm, which are each node's own; `root` and the repository are shared wherever they lie."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    @property
    def shared(self) -> Path:
        """A directory that is the same on all nodes and here."""
        return self.root / "shared"

    @property
    def environment(self) -> dict[str, str]:
        """What a program needs in its environment to find the cluster."""
        return machines.environment(self.root)

    def up(self, *, dies_with_caller: bool = True, wait_s: float = 0.0) -> None:
        """Starts everything and returns when all nodes are idle. With `dies_with_caller` it ends with the thread that
        called this. Waits up to `wait_s` for another cluster to end.

        Raises:
            LockedError: there is another one.
            ClusterError, MachineError: not all came up.
        """
        lock = take_lock(self.root, os.getpid() if dies_with_caller else None, wait_s)
        try:
            write_settings(self.root)
            self._keep("control", machines.start_control(self.root, lock, dies_with_caller=dies_with_caller))
        finally:
            os.close(lock)
        try:
            ping = ["scontrol", "ping"]
            answers = lambda: subprocess.run(ping, env=self.environment, capture_output=True).returncode == 0  # noqa: E731
            self.wait_for(answers, "the controller answers", 30.0)
            for name in NODES:
                self.start_node(name)
            self.wait_for(lambda: set(self.states().values()) == {"idle"}, "all nodes are idle", 60.0)
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """Ends everything; the files stay. Does nothing where nothing runs."""
        if control := self._first("control"):
            machines.kill(control)

    @property
    def is_up(self) -> bool:
        return self._first("control") is not None

    def kill_node(self, name: str) -> None:
        """Like a power failure: nobody hears of it, all that ran there is gone, /tmp and /dev/shm too."""
        self.cut(name)
        if first := self._first(name):
            machines.kill(first)

    def start_node(self, name: str) -> None:
        self._keep(name, machines.start_node(self.root, self._control(), name, [self.root, *_used_here()]))

    def cut(self, name: str) -> None:
        """Takes the node's link away; what runs on it goes on."""
        machines.set_link(self._control(), name, up=False)

    def heal(self, name: str) -> None:
        """Gives the link back. Slurm asks a node that it has given up seldom; `resume` makes it ask now."""
        machines.set_link(self._control(), name, up=True)

    def drain(self, name: str) -> None:
        """Lets no new job start there."""
        self.run("scontrol", "update", f"NodeName={name}", "State=DRAIN", "Reason=test")

    def resume(self, name: str) -> None:
        """Lets jobs start there again."""
        command = ["scontrol", "update", f"NodeName={name}", "State=RESUME"]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        state = self.states()[name]  # one that is back already is refused
        if "drain" in state or state.startswith("down"):
            raise ClusterError(f"{name} stays {state}: {done.stderr.strip()}")

    def processes(self, name: str) -> list[psutil.Process]:
        """All that runs on the node, Slurm's own too, to be looked at and signalled from here."""
        first = self._first(name)
        return psutil.Process(first).children(recursive=True) if first else []

    def on_node(self, name: str, path: str) -> Path:
        """`path` as the node sees it, to be read and written here: on_node("n1", "/tmp/cache")."""
        return Path(f"/proc/{self._first(name)}/root", path.lstrip("/"))

    def states(self) -> dict[str, str]:
        """The state of each node, such as idle, mixed, allocated, down or drained; with a * if it does not respond."""
        lines = self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T").splitlines()
        return dict(line.split() for line in lines)

    def run(self, *command: str, cwd: Path | None = None, timeout: float = 60.0) -> str:
        """Runs a command as on a login node and returns its output without white space at its ends.

        Raises:
            subprocess.CalledProcessError: it failed; its standard error is in the message.
            ClusterError: the cluster is not up, which Slurm's commands take a minute to notice.
        """
        self._control()
        done = subprocess.run(
            command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=timeout
        )
        if done.returncode:
            error = subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
            error.add_note(done.stderr)
            raise error
        return done.stdout.strip()

    def submit(self, script: str, *options: str) -> int:
        """Submits the lines of a bash script, with options of sbatch, and returns the job's number. Its output goes to
        JOB.out in the shared directory, that of all its attempts."""
        output = f"--output={self.shared}/%j.out"
        command = ["sbatch", "--parsable", "--open-mode=append", output, f"--chdir={self.shared}", *options]
        done = subprocess.run(
            command, env=self.environment, input=f"#!/bin/bash\n{script}\n", capture_output=True, text=True
        )
        if done.returncode:
            raise ClusterError(done.stderr.strip())
        return int(done.stdout)

    def output(self, job: int) -> str:
        """What a job of `submit` has written so far."""
        path = self.shared / f"{job}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def job(self, job: int | str) -> dict[str, str]:
        """What `scontrol show job` says of it: JobState, Reason, Restarts, NodeList, ExitCode and so on."""
        line = self.run("scontrol", "--oneliner", "show", "job", str(job))
        return dict(re.findall(r"(\S+?)=(.*?)(?= [\w/:]+=|$)", line))

    def jobs(self) -> list[int]:
        """The numbers of all jobs that have not ended, in ascending order."""
        return sorted(int(number) for number in self.run("squeue", "--noheader", "--format=%A").split())

    def set_time_left(self, job: int, seconds: int) -> None:
        """Moves the end of a running job's time. Slurm looks each 30 s whose time is over, and whom to signal since it
        will be before it looks again."""
        self.run("scontrol", "update", f"JobId={job}", f"EndTime=now+{seconds}")

    def kick(self) -> None:
        """Lets jobs start that Slurm holds for some seconds because they were requeued. The hold has a purpose: a node
        on which something of the job's last attempt still runs refuses the next one and is drained."""
        for line in self.run("squeue", "--noheader", "--states=PENDING", "--format=%A %r").splitlines():
            number, _, reason = line.partition(" ")
            if reason == "BeginTime":
                self.run("scontrol", "update", f"JobId={number}", "StartTime=now")

    def wait_for(self, happened: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
        """Waits until `happened` answers yes.

        Raises:
            ClusterError: it did not within `seconds`; says what the cluster looks like then.
        """
        end = time.monotonic() + seconds
        while not happened():
            if time.monotonic() > end:
                raise ClusterError(f"waited {seconds:.0f} s in vain until {what}\n{self.status()}")
            time.sleep(0.1)

    def wait_for_state(self, job: int | str, *states: str, seconds: float = 60.0) -> dict[str, str]:
        """Waits until the job is in one of `states`, such as RUNNING or COMPLETED, and returns what Slurm says."""
        said: dict[str, str] = {}

        def reached() -> bool:
            said.update(self.job(job))
            return said["JobState"] in states

        self.wait_for(reached, f"job {job} is {' or '.join(states)}", seconds)
        return said

    def restore(self, keep: int = 0) -> None:
        """Ends all jobs whose numbers are above `keep` and brings all nodes back, also what was down as a whole."""
        if not self.is_up:
            self.up()
        self.cancel(*(job for job in self.jobs() if job > keep))
        for name, state in self.states().items():
            if "drain" in state:
                self.resume(name)
            if self._first(name) is None:
                self.start_node(name)
            elif state.endswith("*") or state.startswith("down"):
                self.kill_node(name)
                self.start_node(name)
            else:
                self.heal(name)
        kept = set(self.jobs()) & set(range(keep + 1))
        usable = {"idle", "mixed", "allocated"} if kept else {"idle"}
        self.wait_for(lambda: set(self.states().values()) <= usable, "all nodes are back", 90.0)

    def cancel(self, *jobs: int) -> None:
        if jobs:
            self.run("scancel", *map(str, jobs))

    def status(self) -> str:
        """Nodes and jobs as a table, and the ends of jobs' outputs and of the controller's log, for people."""
        parts = [
            self.run("sinfo", "--Node", "--partition=main", "--format=%N %T %E"),
            self.run("squeue", "--states=all", "--format=%i %j %P %T %r %N %M"),
        ]
        for path in [*(self.shared / f"{job}.out" for job in self.jobs()), self.root / "log/slurmctld.log"]:
            if path.exists():
                parts.append("\n".join([f"{path}:", *path.read_text(errors="replace").splitlines()[-10:]]))
        return "\n\n".join(parts)

    def _keep(self, name: str, first: int) -> None:
        started = psutil.Process(first).create_time()
        (self.root / f"run/{name}.json").write_text(json.dumps([first, started]))

    def _first(self, name: str) -> int | None:
        """The first process of a machine if it still runs."""
        path = self.root / f"run/{name}.json"
        if not path.exists():
            return None
        number, started = json.loads(path.read_text())
        try:
            process = psutil.Process(number)
            alive = process.create_time() == started and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return None
        return number if alive else None

    def _control(self) -> int:
        if (control := self._first("control")) is None:
            end = machines.said(self.root, "control")
            raise ClusterError(f"the cluster of {self.root} is not up; it last said: {end}")
        return control


def running() -> Cluster | None:
    """The cluster that is up on this machine, whoever started it."""
    root = last_root()
    cluster = Cluster(root) if root else None
    return cluster if cluster and cluster.is_up else None


def _used_here() -> list[Path]:
    """What jobs need of this machine's files: the repository, Python and its packages."""
    return sorted({REPOSITORY, Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()})


def main(arguments: Sequence[str]) -> int:
    command, *rest = arguments or [""]
    if missing := what_is_missing():
        print(f"error: {missing}", file=sys.stderr)
        return 2
    cluster = running()
    if command == "up":
        if cluster is None:
            cluster = Cluster(Path(tempfile.mkdtemp(prefix="slurm-cluster-")))
            cluster.up(dies_with_caller=False, wait_s=2.0)
        print(f"{cluster.status()}\n\nexport SLURM_CONF={cluster.environment['SLURM_CONF']}")
    elif command not in ("down", "status", "kill", "start", "cut", "heal", "run"):
        print(__doc__, file=sys.stderr)
        return 2
    elif cluster is None:
        print("no cluster is up", file=sys.stderr)
        return 0 if command == "down" else 1
    elif command == "down":
        cluster.down()
        shutil.rmtree(cluster.root)
    elif command == "status":
        print(cluster.status())
    elif command == "run":
        return subprocess.run(rest, env=cluster.environment).returncode
    else:
        act = {
            "kill": cluster.kill_node,
            "start": cluster.start_node,
            "cut": cluster.cut,
            "heal": cluster.heal,
        }
        for name in rest:
            act[command](name)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ClusterError, LockedError, machines.MachineError) as error:
        sys.exit(f"error: {error}")
