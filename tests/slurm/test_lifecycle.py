"""How the cluster comes and goes: nothing of it outlives its user, and there is one at a time."""

import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from sdpo_megatron.launch.processes import wait_until
from tests.slurm import cluster as cluster_module
from tests.slurm import machines
from tests.slurm.cluster import REPOSITORY, Cluster, ClusterError, what_is_missing
from tests.slurm.lock import LockedError

UP = "import sys, time; from pathlib import Path; from tests.slurm.cluster import Cluster; "
UP += "Cluster(Path(sys.argv[1])).up(); print('up', flush=True); time.sleep(1000)"


def left_of(root: Path) -> list[str]:
    """Processes, interfaces and mounts of a cluster."""
    commands = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    left = [command for command in commands if str(root) in command and "Cluster(Path(" not in command]
    left += [name for name in psutil.net_if_addrs() if name == machines.HOST_LINK]
    return left + [line for line in Path("/proc/mounts").read_text().splitlines() if str(root) in line]


def test_nothing_outlives_a_user_that_is_killed(cluster: Cluster, tmp_path: Path):
    cluster.down()
    assert wait_until(lambda: left_of(cluster.root) == [], 10.0), left_of(cluster.root)

    hosts = Path("/etc/hosts").read_text()
    command = [sys.executable, "-c", UP, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPOSITORY) as user:
        try:
            assert user.stdout is not None and user.stdout.readline() == b"up\n"
            other = Cluster(tmp_path)
            job = other.submit("srun sleep 1000", "--nodes=4")
            other.wait_for_state(job, "RUNNING")
            assert len(left_of(tmp_path)) > 10
            assert Path("/etc/hosts").read_text() == hosts
            with pytest.raises(
                LockedError, match=f"is up already, in {tmp_path}: .* the tests of process {user.pid}$"
            ):
                cluster.up()
        finally:
            user.kill()
    assert wait_until(lambda: left_of(tmp_path) == [], 10.0), left_of(tmp_path)
    assert not other.is_up
    cluster.up()
    assert cluster.run("srun", "--nodes=4", "--ntasks=4", "hostname").count("n") == 4


def test_a_cluster_that_lost_its_controller_is_brought_back(cluster: Cluster):
    control = psutil.Process(cluster._control())
    next(process for process in control.children() if process.name() == "slurmctld").kill()
    assert wait_until(lambda: not cluster.is_up, 10.0)
    with pytest.raises(ClusterError, match="is not up"):
        cluster.cut("n1")
    cluster.restore()
    assert set(cluster.states().values()) == {"idle"}


def test_the_command_for_people(cluster: Cluster, capfd: pytest.CaptureFixture[str]):
    """It finds the cluster of a test, too."""
    assert cluster_module.main(["status"]) == 0
    assert "n4 idle" in capfd.readouterr().out
    assert cluster_module.main(["run", "srun", "--nodelist=n3", "hostname"]) == 0
    assert capfd.readouterr().out == "n3\n"
    assert cluster_module.main(["sideways"]) == 2
    assert "kill | start | cut | heal NODE" in capfd.readouterr().err
    cluster.down()
    assert cluster_module.main(["down"]) == 0
    assert cluster_module.main(["status"]) == 1

    command = [sys.executable, "-m", "tests.slurm.cluster"]
    subprocess.run([*command, "up"], cwd=REPOSITORY, check=True, capture_output=True)
    its_own = cluster_module.running()
    assert its_own is not None and its_own.is_up  # though the command that started it has ended
    subprocess.run([*command, "down"], cwd=REPOSITORY, check=True)
    assert not its_own.root.exists()


def test_the_stand_in_of_sacct(cluster: Cluster):
    job = cluster.submit("true")
    cluster.wait_for_state(job, "COMPLETED")
    command = ("sacct", "-o", "JobID,State,NodeList", "--parsable2")
    said = cluster.run(*command, "-j", str(job), "-j", "999")
    assert said.splitlines()[0] == "JobID|State|NodeList"
    assert said.splitlines()[1:] == [f"{job}|COMPLETED|{cluster.job(job)['NodeList']}"]
    with pytest.raises(subprocess.CalledProcessError) as error:
        cluster.run("sacct", "--format=JobID")
    assert "the stand-in of sacct only knows" in error.value.stderr


def test_where_there_can_be_none_it_is_said_why(monkeypatch: pytest.MonkeyPatch):
    missing = {"slurmctld", "munged"}
    which = shutil.which
    monkeypatch.setattr(
        shutil, "which", lambda name, **more: None if name in missing else which(name, **more)
    )
    assert (what_is_missing() or "").startswith("no slurmctld, munged: apt-get install slurmctld ")
    missing.clear()
    monkeypatch.setattr(
        machines, "UNSHARE", ("sh", "-c", "echo unshare failed: Operation not permitted >&2; exit 1")
    )
    assert what_is_missing() == (
        "no namespaces of its own (unshare failed: Operation not permitted): needs root, in a container --privileged"
    )
