"""What a job is given of a cluster: the file of hardware, which any experiment may be combined with."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

import yaml
from sdpo_megatron.errors import ConfigError, UserError
from sdpo_megatron.files import read_text
from sdpo_megatron.strict_yaml.load import load
from sdpo_megatron.strict_yaml.section import NonNegative, Positive, PositiveFloat, Seconds, Section

Placement = Literal["colocated", "split_node", "separate_nodes"]
Word = Annotated[str, Field(pattern=r"^[^\s]+$", max_length=200)]
Scratch = Annotated[str, Field(pattern=r'^[/$][^"`\\\n]*$')]
OPTIONS = {
    **{key: f"hardware.{key}" for key in ("nodes", "partition", "account", "qos", "constraint", "exclusive")},
    **{
        "time": "hardware.time_limit",
        "cpus-per-task": "hardware.cpus_per_node",
        "mem": "hardware.memory_gb_per_node",
    },
    **{"gpus-per-node": "hardware.gpus_per_node", "array": "--sweep"},
    **{"gres": "hardware.gpus_per_node, and hardware.gpu_type", "gpus": "hardware.gpus_per_node"},
    **{"ntasks": "parallel.tp, pp and dp", "ntasks-per-node": "parallel.tp, pp and dp"},
    **{"signal": "hardware.grace_s", "job-name": "run.name"},
}
"""Options of sbatch, and what to write instead."""
_LONG_NAME = re.compile(r"[a-z][a-z0-9]+(-[a-z0-9]+)*")
_LIMIT = re.compile(r"(\d+-)?\d+:[0-5]\d:[0-5]\d")
_TIME = re.compile(r"(?:(\d+)-)?(\d+(?::\d+){0,2})")


class HardwareSettings(Section):
    """One kind of allocation."""

    nodes: Positive = 1
    gpus_per_node: NonNegative = 0
    """0: the job runs on CPUs."""
    gpu_type: Word | None = None
    """As Slurm's gres calls it, where a partition has several."""
    cpus_per_node: Positive = 1
    memory_gb_per_node: PositiveFloat | None = None
    """GB of memory that the job is given on each node; by default all that a node has."""
    time_limit: str = "24:00:00"
    """HH:MM:SS or D-HH:MM:SS: of one attempt; the run goes on in the next."""
    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    exclusive: bool = False
    """Whether nobody else may use the nodes."""
    placement: Placement = "colocated"
    """`colocated`: servers and trainer share all GPUs in turn. `split_node`: on each node some GPUs serve and the
    others train. `separate_nodes`: some nodes serve and the others train."""
    server_gpus_per_node: NonNegative = 0
    """Of `split_node`: the GPUs of each node that serve."""
    server_nodes: NonNegative = 0
    """Of `separate_nodes`: the nodes that serve."""
    setup: list[str] = []
    """Lines of shell before anything else in the job: modules, variables of the site."""
    srun_args: list[str] = []
    """Further arguments of each step, such as a container's."""
    sbatch_args: dict[Word, str | int | bool] = {}
    """Further options of the job, by long name without dashes; `true` for those without a value."""
    scratch: Scratch | None = None
    """A directory on each node's own disk, which may begin with a variable of the site's; by default what the site
    calls SLURM_TMPDIR, else /tmp."""
    max_requeues: NonNegative = 20
    """How often a job may come back after failures; preemptions and time limits do not count."""
    grace_s: Seconds = 120.0
    """How long before its end a job is told to save: by the time limit, and by a preemption where the site grants so
    much."""

    @property
    def time_limit_s(self) -> int:
        """Returns the time limit in seconds. Raises ConfigError where it is none."""
        if not _LIMIT.fullmatch(self.time_limit):
            raise ConfigError(
                f"hardware.time_limit is {self.time_limit!r}; write HH:MM:SS or D-HH:MM:SS, such as 24:00:00."
            )
        total = int(seconds_of(self.time_limit))
        if total < 60:
            raise ConfigError(f"hardware.time_limit is {self.time_limit!r}; give a minute at least.")
        return total


def seconds_of(text: str) -> float:
    """Returns the seconds in [DAYS-][[HOURS:]MINUTES:]SECONDS, as Slurm prints times; infinity for what is none, such
    as UNLIMITED."""
    match = _TIME.fullmatch(text)
    if match is None:
        return math.inf
    seconds = 0
    for part in match[2].split(":"):
        seconds = seconds * 60 + int(part)
    return int(match[1] or 0) * 86_400 + seconds


class HardwareFile(Section):
    hardware: HardwareSettings = HardwareSettings()


def is_hardware(path: str | Path) -> bool:
    """Returns whether the YAML file `path` is one of hardware: it has that section."""
    try:
        values = yaml.safe_load(read_text(Path(path)))
    # what is wrong with it is said where it is read
    except (OSError, ValueError, UserError, yaml.YAMLError, RecursionError):
        return False
    return isinstance(values, dict) and "hardware" in values


def load_hardware(files: Sequence[str | Path], overrides: Sequence[str]) -> HardwareSettings:
    """Returns the settings in `files` and `overrides` ("hardware.nodes=4"). Raises ConfigError for a mistake."""
    hardware = load(HardwareFile, files, overrides, {})[0].hardware
    _ = hardware.time_limit_s
    check_placement(hardware)
    check_own_keys(hardware)
    return hardware


def check_own_keys(hardware: HardwareSettings) -> None:
    """Raises ConfigError for an option of sbatch that a key of its own stands for, or whose name is none."""
    for option in hardware.sbatch_args:
        if not _LONG_NAME.fullmatch(option):
            raise ConfigError(
                f"hardware.sbatch_args.{option}: write the long name of the option without dashes before it, such as "
                "mail-type."
            )
        if option in OPTIONS:
            raise ConfigError(f"hardware.sbatch_args.{option}: write {OPTIONS[option]} in its place.")


def check_placement(hardware: HardwareSettings) -> None:
    """Raises ConfigError where the keys of the placements do not fit the one that is chosen."""
    split, separate = hardware.server_gpus_per_node, hardware.server_nodes
    placement = hardware.placement
    if split and placement != "split_node":
        raise ConfigError(
            f"hardware.server_gpus_per_node={split} is for hardware.placement=split_node, and it is {placement}."
        )
    if separate and placement != "separate_nodes":
        raise ConfigError(
            f"hardware.server_nodes={separate} is for hardware.placement=separate_nodes, and it is {placement}."
        )
    if placement == "split_node" and not 0 < split < hardware.gpus_per_node:
        raise ConfigError(
            f"hardware.server_gpus_per_node is {split}; with hardware.placement=split_node give from 1 to "
            f"{hardware.gpus_per_node - 1} of the {hardware.gpus_per_node} GPUs of a node to the servers."
            if hardware.gpus_per_node > 1
            else "hardware.placement=split_node needs hardware.gpus_per_node of 2 or more; take colocated or "
            "separate_nodes."
        )
    if placement == "separate_nodes" and not 0 < separate < hardware.nodes:
        raise ConfigError(
            f"hardware.server_nodes is {separate}; with hardware.placement=separate_nodes give from 1 to "
            f"{hardware.nodes - 1} of the {hardware.nodes} nodes to the servers."
            if hardware.nodes > 1
            else "hardware.placement=separate_nodes needs hardware.nodes of 2 or more; take colocated or split_node."
        )
