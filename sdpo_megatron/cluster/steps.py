"""The named steps of one job: which command Slurm starts where. A pure function of layout, hardware and hosts.

Every step sees all that its nodes have of the job, and takes the GPUs that the layout gives it: what Slurm would deal
out by itself depends on which step comes first."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdpo_megatron.cluster.hardware import HardwareSettings
from sdpo_megatron.cluster.layout import Layout, ServerPlace

TRAINER = "trainer"


@dataclass(frozen=True, kw_only=True)
class Step:
    name: str
    hosts: tuple[str, ...]
    tasks_per_node: int
    command: tuple[str, ...]
    """By which Slurm starts it."""
    program: tuple[str, ...]
    """What each task runs, the end of `command`."""
    log: str
    """Where its output goes; %t stands for the task's number."""


def trainer_step(
    layout: Layout,
    hardware: HardwareSettings,
    hosts: Sequence[str],
    *,
    python: str,
    fence: Sequence[str],
    arguments: Sequence[str],
    logs: Path,
) -> Step:
    """Returns the step of all ranks. `hosts` are the job's nodes, in Slurm's order; `arguments` are those of
    sdpo_megatron.train; each rank writes its own file in `logs`. `fence`: where it is written how many attempts have
    begun, and which this is."""
    each = layout.ranks_per_node
    gpus = [place.gpu for place in layout.ranks[:each] if place.gpu is not None]
    program = [
        *(python, "-m", "sdpo_megatron.job.rank", *fence, hosts[0], str(layout.master_port)),
        *(_numbers(gpus), *arguments),
    ]
    on = [hosts[node] for node in layout.trainer_nodes]
    return _step(TRAINER, hardware, on, each, program, logs / "rank%t.log")


def server_step(
    place: ServerPlace,
    hardware: HardwareSettings,
    hosts: Sequence[str],
    *,
    python: str,
    fence: Sequence[str],
    arguments: Sequence[str],
    logs: Path,
    key_file: Path,
    world_size: int,
) -> Step:
    """Returns the step of one server, which has its key in `key_file`, beside a trainer of `world_size` ranks."""
    name, host = f"server{place.index}", hosts[place.node]
    program = [
        *(python, "-m", "sdpo_megatron.job.server", *fence, host, str(place.port)),
        *(_numbers(place.gpus), str(key_file), str(logs / f"{name}.log"), str(world_size)),
        *("trainer" if hardware.placement == "colocated" else "nobody", *arguments),
    ]
    return _step(name, hardware, [host], 1, program, logs / f"{name}.out")


def _numbers(gpus: Sequence[int]) -> str:
    return ",".join(map(str, gpus)) or "-"


def _step(
    name: str,
    hardware: HardwareSettings,
    hosts: Sequence[str],
    tasks_per_node: int,
    program: Sequence[str],
    log: Path,
) -> Step:
    command = [
        "srun",
        f"--job-name={name}",
        f"--nodes={len(hosts)}",
        f"--ntasks={len(hosts) * tasks_per_node}",
        f"--ntasks-per-node={tasks_per_node}",
        f"--nodelist={','.join(hosts)}",
        "--distribution=block",
        # one for each task, and what is left over for their threads
        f"--cpus-per-task={max(1, hardware.cpus_per_node // tasks_per_node)}",
        "--cpu-bind=none",
        # all of the job's memory, shared with the other steps
        "--mem=0",
        "--overlap",
        "--unbuffered",
        "--kill-on-bad-exit=1",
        f"--output={log}",
        "--open-mode=append",
    ]
    if hardware.gpus_per_node:
        command.append(f"--gpus-per-node={_gpus(hardware)}")
    return Step(
        name=name,
        hosts=tuple(hosts),
        tasks_per_node=tasks_per_node,
        command=(*command, *hardware.srun_args, *program),
        program=tuple(program),
        log=str(log),
    )


def job_options(hardware: HardwareSettings, name: str) -> dict[str, str]:
    """Returns the options of sbatch, by long name without dashes; an empty value is an option without one."""
    options = {
        "job-name": name,
        "nodes": str(hardware.nodes),
        "ntasks-per-node": "1",
        "cpus-per-task": str(hardware.cpus_per_node),
        "time": hardware.time_limit,
        # to the batch shell alone, which hands it on
        "signal": f"B:USR2@{round(hardware.grace_s)}",
        "open-mode": "append",
        "requeue": "",
    }
    memory = hardware.memory_gb_per_node
    options["mem"] = "0" if memory is None else f"{round(memory * 1000)}M"
    if hardware.gpus_per_node:
        options["gpus-per-node"] = _gpus(hardware)
    for key in ("partition", "account", "qos", "constraint"):
        value = getattr(hardware, key)
        if value is not None:
            options[key] = value
    if hardware.exclusive:
        options["exclusive"] = ""
    for key, value in hardware.sbatch_args.items():
        if value is not False:
            options[key] = "" if value is True else str(value)
    return options


def _gpus(hardware: HardwareSettings) -> str:
    kind = "" if hardware.gpu_type is None else f"{hardware.gpu_type}:"
    return f"{kind}{hardware.gpus_per_node}"
