"""What the cluster's programs read: Slurm's settings, the fake GPUs, names and addresses."""

import os
import time
from pathlib import Path

NODES = ("n1", "n2", "n3", "n4")
GPUS_PER_NODE = 2
CPUS_PER_NODE = 16
"""Announced, not there: all nodes share the machine's."""
MEMORY_PER_NODE_MB = 16_000
SHORT_MAX_MINUTES = 2
REQUEUE_DELAY_S = 10
"""A requeued job waits for so long before it may start again."""

CONTROLLER = "control"
NETWORK = "10.213.77"
CONTROLLER_ADDRESS = f"{NETWORK}.254"
LOGIN_ADDRESS = f"{NETWORK}.253"
"""This machine's own, from where jobs are submitted."""


def address(node: str) -> str:
    return f"{NETWORK}.{NODES.index(node) + 1}"


def hardware_address(node: str) -> str:
    return f"02:00:00:00:00:{NODES.index(node) + 1:02x}"


def write_settings(root: Path) -> None:
    """Writes all files below `root`/etc and makes the devices of the fake GPUs and the directories of the daemons."""
    for directory in (
        "etc",
        "state",
        "spool",
        "log",
        "run",
        "dev",
        "local",
        "shared",
        *(f"spool/{name}" for name in NODES),
    ):
        (root / directory).mkdir(parents=True, exist_ok=True)
    etc = root / "etc"
    (etc / "slurm.conf").write_text(slurm_conf(root))
    for number in range(GPUS_PER_NODE):
        device = root / f"dev/gpu{number}"
        if not device.exists():
            os.mknod(device, 0o20666, os.makedev(1, 3))  # as /dev/null
    (etc / "gres.conf").write_text(
        f"NodeName={','.join(NODES)} Name=gpu File={root}/dev/gpu[0-{GPUS_PER_NODE - 1}]\n"
    )
    # Slurm loads a plugin for cgroups though no setting uses one; this one does nothing where there are none.
    (etc / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    names = [("127.0.0.1", "localhost"), (CONTROLLER_ADDRESS, CONTROLLER), (LOGIN_ADDRESS, "login")]
    names += [(address(node), node) for node in NODES]
    (etc / "hosts").write_text("".join(f"{where} {name}\n" for where, name in names))
    # Without a route to a name server each question to one takes 10 s, and torch asks for names of addresses.
    databases = ("passwd", "group", "shadow", "hosts", "services", "protocols")
    (etc / "nsswitch.conf").write_text("".join(f"{database}: files\n" for database in databases))
    key = etc / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))


def slurm_conf(root: Path) -> str:
    settings = {
        "ClusterName": "test",
        "SlurmctldHost": f"{CONTROLLER}({CONTROLLER_ADDRESS})",
        "SlurmUser": "root",
        "SlurmdUser": "root",
        "AuthType": "auth/munge",
        # cred_expire also is how long a requeued job is held, 120 s by default.
        "AuthInfo": f"socket={root}/run/munge,cred_expire={REQUEUE_DELAY_S}",
        "StateSaveLocation": f"{root}/state",
        "SlurmdSpoolDir": f"{root}/spool/%n",
        "SlurmctldPidFile": f"{root}/run/slurmctld.pid",
        "SlurmdPidFile": f"{root}/run/slurmd-%n.pid",
        "SlurmctldLogFile": f"{root}/log/slurmctld.log",
        "SlurmdLogFile": f"{root}/log/slurmd-%n.log",
        "AccountingStorageType": "accounting_storage/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "SwitchType": "switch/none",
        "MpiDefault": "none",
        "GresTypes": "gpu",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU_Memory",
        "DefMemPerCPU": 256,  # else one job takes all memory of a node
        "SlurmdParameters": "config_overrides",  # believes the numbers of CPUs and memory below
        "SlurmctldParameters": "preempt_send_user_signal",
        "SchedulerType": "sched/backfill",
        "SchedulerParameters": "bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0",
        "EnforcePartLimits": "ALL",  # refuses what can never run, in place of queueing it
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "JobRequeue": 1,
        "ReturnToService": 2,
        "KillWait": 3,
        "InactiveLimit": 0,
        "OverTimeLimit": 0,
        "MinJobAge": 3600,  # keeps ended jobs in memory, where the stand-in of sacct finds them
        # A number that comes twice would let submitit take an old job's results for a new one's.
        "FirstJobId": int(time.time()) % 10_000_000 + 1000,
        "SlurmctldTimeout": 30,
        # How soon a dead node is noticed.
        "SlurmdTimeout": 10,
        # A node may take KillWait to answer that it has ended a step. Slurm tells who does not answer once more, a
        # minute later: a requeued job then has another step of that number.
        "MessageTimeout": 8,
        "TCPTimeout": 2,
    }
    names = f"n[1-{len(NODES)}]"
    lines = [f"{name}={value}" for name, value in settings.items()]
    lines.append(
        f"NodeName={names} NodeAddr={NETWORK}.[1-{len(NODES)}] CPUs={CPUS_PER_NODE} "
        f"RealMemory={MEMORY_PER_NODE_MB} Gres=gpu:{GPUS_PER_NODE} State=UNKNOWN"
    )
    lines += [
        "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=10",
        "PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10",
        f"PartitionName=short Nodes=ALL MaxTime={SHORT_MAX_MINUTES} State=UP PriorityTier=1 GraceTime=10",
    ]
    return "\n".join(lines) + "\n"
