"""The cluster that the other tests of this folder run on does what a real one does."""

import shlex
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import submitit

from tests.slurm.cluster import REPOSITORY, Cluster, ClusterError
from tests.slurm.slurm_conf import NODES, address

# Says what it is and each signal that reaches it, with the second of the minute, and never ends of itself.
WATCH = r"""srun bash -c '
for name in TERM USR2; do trap "echo $name \$(date +%s)" $name; done
echo "start ${SLURM_RESTART_COUNT:-0} $(hostname) $(date +%s)"
while :; do sleep 0.1; done
'"""


def test_four_nodes_with_names_and_addresses_of_their_own(cluster: Cluster):
    said = cluster.run(
        "srun", "--nodes=4", "bash", "-c", "echo $(hostname) $(ip -4 -o address show dev eth0)"
    )
    assert {line.split()[0]: line.split()[4] for line in said.splitlines()} == {
        name: f"{address(name)}/24" for name in NODES
    }
    assert socket.gethostname() not in NODES


def test_a_job_over_two_nodes(cluster: Cluster, shared_dir: Path, tmp_path: Path):
    """Its ranks see shared files, each node's own temporary files and shared memory, its GPUs and each other."""
    (shared_dir / "listen.py").write_text(
        "import os, socket, sys\n"
        "if os.environ['SLURM_PROCID'] == '0':\n"
        "    server = socket.create_server(('', 5000))\n"
        "    server.settimeout(20)\n"
        "    open('listening', 'w').close()\n"
        "    print('heard', server.accept()[0].recv(10).decode())\n"
        "else:\n"
        "    while not os.path.exists('listening'): pass\n"
        "    socket.create_connection((sys.argv[1], 5000), 20).sendall(b'hello')\n"
        "print('gpus', os.environ['CUDA_VISIBLE_DEVICES'], os.path.exists(sys.argv[2]))\n"
        "own, job = socket.gethostname(), os.environ['SLURM_JOB_ID']\n"
        "for place in '/tmp', '/dev/shm':\n"
        "    open(f'{place}/{job}-{own}', 'w').close()\n"
        "    print(own, 'sees', *(name for name in os.listdir(place) if name.startswith(job)))\n"
    )
    python = f"{REPOSITORY}/.venv/bin/python" if (REPOSITORY / ".venv").exists() else sys.executable
    job = cluster.submit(
        f"cd {shared_dir} && srun {shlex.quote(python)} listen.py n3 {tmp_path}",
        "--nodelist=n3,n4",
        "--gpus-per-node=2",
    )
    ended = cluster.wait_for_state(job, "COMPLETED", "FAILED")
    assert ended["JobState"] == "COMPLETED", cluster.output(job)
    said = sorted(cluster.output(job).splitlines())
    # the test's own directory is in this machine's /tmp
    seen = [f"{name} sees {job}-{name}" for name in ("n3", "n3", "n4", "n4")]
    assert said == ["gpus 0,1 False"] * 2 + ["heard hello", *seen]
    assert cluster.on_node("n3", f"/tmp/{job}-n3").exists() and not Path(f"/tmp/{job}-n3").exists()


def test_a_cancelled_job_is_asked_first(cluster: Cluster):
    job = cluster.submit(WATCH, "--nodelist=n2")
    cluster.wait_for(lambda: "start 0" in cluster.output(job), "the job runs")
    assert {process.name() for process in cluster.processes("n2")} >= {"slurmd", "slurmstepd", "srun", "bash"}
    cluster.cancel(job)
    assert cluster.wait_for_state(job, "CANCELLED")["Restarts"] == "0"
    cluster.wait_for(
        lambda: [process.name() for process in cluster.processes("n2")] == ["slurmd"], "it is gone", 15
    )
    assert "TERM" in cluster.output(job)


def test_drained_nodes_take_no_job(cluster: Cluster):
    cluster.drain("n2")
    job = cluster.submit("true", "--nodelist=n2")
    cluster.wait_for(lambda: "ReqNodeNotAvail" in cluster.job(job)["Reason"], "it is not started", 20)
    assert cluster.states()["n2"] == "drained"
    cluster.resume("n2")
    cluster.wait_for_state(job, "COMPLETED")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--nodes=9"], "Node count specification invalid"),
        (["--partition=nowhere"], "invalid partition specified: nowhere"),
        (["--partition=short", "--time=3"], "Requested time limit is invalid"),
        (["--gpus-per-node=3"], "Requested node configuration is not available"),
    ],
)
def test_what_can_never_run_is_refused(cluster: Cluster, options: list[str], said: str):
    with pytest.raises(ClusterError, match=said):
        cluster.submit("true", *options)


@pytest.fixture
def fast_watcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submitit.SlurmJob.watcher, "_delay_s", 1)


def executor(folder: Path, **parameters: object) -> submitit.AutoExecutor:
    made = submitit.AutoExecutor(folder=folder, cluster="slurm")
    made.update_parameters(timeout_min=5, slurm_partition="main", cpus_per_task=1, mem_gb=1, **parameters)
    return made


def summing() -> Callable[[], tuple[str, int, float]]:
    def sum_of_ranks() -> tuple[
        str, int, float
    ]:  # travels as code: a job need not be able to import this file
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        environment = submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        dist.init_process_group("gloo")
        total = torch.tensor([float(environment.rank)])
        dist.all_reduce(total)
        dist.destroy_process_group()
        return environment.master_addr, environment.rank, total.item()

    return sum_of_ranks


@pytest.mark.usefixtures("fast_watcher")
def test_a_job_of_submitit_returns_the_result_of_each_task(cluster: Cluster, shared_dir: Path):
    """Of tasks that reach each other by the names of their nodes."""
    job = executor(shared_dir, nodes=2, tasks_per_node=2, slurm_nodelist="n2,n3").submit(summing())
    assert job.results() == [("n2", rank, 6.0) for rank in range(4)]
    cluster.wait_for(
        lambda: job.get_info(mode="force").get("State") == "COMPLETED", "submitit knows that it ended"
    )
    assert job.get_info()["NodeList"] == "n[2-3]"


@pytest.mark.usefixtures("fast_watcher")
def test_an_array_of_submitit(cluster: Cluster, shared_dir: Path):
    jobs = executor(shared_dir).map_array(abs, [-1, -2, -3])
    assert [job.result() for job in jobs] == [1, 2, 3]
    cluster.wait_for(
        lambda: {job.get_info(mode="force").get("State") for job in jobs} == {"COMPLETED"}, "all ended"
    )
