"""What Slurm's partitions have, as `sinfo` prints it, and why a request does not fit: pure functions.

One node must have all that is asked of each at once: a partition may hold nodes of several kinds."""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sdpo_megatron.cluster.hardware import HardwareSettings, seconds_of
from sdpo_megatron.errors import ConfigError, RunFailed

SINFO = ("sinfo", "--all", "--noheader", "--exact", "--format=%P|%a|%l|%s|%B|%D|%T|%c|%m|%G|%f")
"""One line for the nodes of a partition that are alike in all of this; also of one that the site hides."""
FIELDS = 11
_OUTSIDE_PARENTHESES = re.compile(r",(?![^(]*\))")
_GONE = {"down", "drained", "draining", "fail", "failing", "error", "maint", "unknown", "future"}


@dataclass(frozen=True, kw_only=True)
class NodeKind:
    """Nodes that are alike."""

    count: int
    state: str
    cpus: int
    memory_mb: int
    gpus: Mapping[str, int]
    """By type; the type is empty where the site names none."""
    features: frozenset[str]

    @property
    def is_up(self) -> bool:
        """Whether a job can start there once it is free."""
        # a star: it does not respond; other signs are about saving power
        return not self.state.endswith("*") and self.state.rstrip("~#!%$@^-+") not in _GONE


@dataclass(frozen=True, kw_only=True)
class Partition:
    name: str
    is_default: bool
    availability: str
    time_limit_s: float
    most_nodes: float
    """Of one job."""
    nodes: tuple[NodeKind, ...]


def parse_partitions(text: str) -> list[Partition]:
    """Returns the partitions in what SINFO prints, in its order. Raises RunFailed for what sinfo does not print."""
    found: dict[str, Partition] = {}
    for line in text.splitlines():
        fields = line.split("|")
        if len(fields) != FIELDS:
            raise RunFailed(
                f"sinfo answers {line!r}, which has not the {FIELDS} fields that it was asked for."
            )
        name, availability, limit, size, most_cpus, count, state, cpus, memory, gres, features = fields
        kind = NodeKind(
            count=_number(count),
            state=state.lower(),
            cpus=min(_number(cpus), _number(most_cpus) or _number(cpus)),
            memory_mb=_number(memory),
            gpus=parse_gpus(gres),
            features=frozenset() if features == "(null)" else frozenset(features.split(",")),
        )
        before = found.get(name)
        found[name] = Partition(
            name=name.removesuffix("*"),
            is_default=name.endswith("*"),
            availability=availability.lower(),
            time_limit_s=seconds_of(limit),
            most_nodes=_most(size),
            nodes=(*(before.nodes if before else ()), *([kind] if kind.count else [])),
        )
    return list(found.values())


def parse_gpus(gres: str) -> dict[str, int]:
    """Returns the GPUs of each type in a node's list, such as gpu:h100:8(S:0-1),nvme:1."""
    found: Counter[str] = Counter()
    for entry in _OUTSIDE_PARENTHESES.split(gres):
        words = entry.partition("(")[0].split(":")
        if words[0] == "gpu":
            kind = words[1] if len(words) > 2 else ""
            found[kind] += _number(words[-1]) if len(words) > 1 else 1
    return dict(found)


def check_request(hardware: HardwareSettings, partitions: Sequence[Partition]) -> str | None:
    """Returns what to say of a request that can run, None for nothing. Raises ConfigError for one that cannot."""
    chosen = _chosen(hardware.partition, partitions)
    remarks: list[str | None] = []
    refusals: list[ConfigError] = []
    for partition in chosen:
        try:
            remarks.append(_fit(hardware, partition, partitions))
        except ConfigError as error:
            refusals.append(error)
    # of several, Slurm takes the one that can start it first
    if not remarks:
        raise refusals[0]
    return remarks[0]


def _chosen(names: str | None, partitions: Sequence[Partition]) -> list[Partition]:
    there = {partition.name: partition for partition in partitions}
    if names is None:
        chosen = [partition for partition in partitions if partition.is_default]
        if not chosen:
            raise ConfigError(
                f"hardware.partition is not set, and this cluster has no default: take one of {_listed(there)}."
            )
        return chosen
    for name in names.split(","):
        if name not in there:
            raise ConfigError(
                f"hardware.partition is {name}, which this cluster does not have: take one of {_listed(there)}."
            )
    return [there[name] for name in names.split(",")]


def _fit(hardware: HardwareSettings, partition: Partition, partitions: Sequence[Partition]) -> str | None:
    own = f"partition {partition.name}"
    if partition.availability != "up":
        others = [other.name for other in partitions if other.availability == "up"]
        raise ConfigError(
            f"hardware.partition: {own} is {partition.availability}, and starts no job: "
            + (f"take {' or '.join(others)}" if others else "ask who runs the cluster")
            + "."
        )
    if hardware.time_limit_s > partition.time_limit_s:
        raise ConfigError(
            f"hardware.time_limit is {hardware.time_limit}, and {own} allows {_time(partition.time_limit_s)}: make it "
            "that or less; a run that needs longer goes on in the job's next attempt."
        )
    there = sum(kind.count for kind in partition.nodes)
    most = min(there, partition.most_nodes)
    if hardware.nodes > most:
        has = f"{own} has {there} in all" if most == there else f"a job of {own} may have {most:.0f}"
        raise ConfigError(f"hardware.nodes is {hardware.nodes}, and {has}: make it {most:.0f} or less.")
    demands = _demands(hardware, partition)
    for refusal, meets in demands:
        if not any(meets(kind) for kind in partition.nodes):
            raise ConfigError(refusal)
    fitting = [kind for kind in partition.nodes if all(meets(kind) for _, meets in demands)]
    count = sum(kind.count for kind in fitting)
    if count < hardware.nodes:
        raise ConfigError(
            f"hardware.nodes is {hardware.nodes}, but only {count} of the {there} nodes of {own} have "
            f"{_asked(hardware)}: ask for fewer nodes, or for less of each."
        )
    up = sum(kind.count for kind in fitting if kind.is_up)
    if up < hardware.nodes:
        return f"The job will wait: of the {count} nodes of {own} that have what it asks, {up} are up now."
    return None


Demand = tuple[str, Callable[[NodeKind], bool]]
"""What to say where no node meets it, and whether a node does."""


def _demands(hardware: HardwareSettings, partition: Partition) -> list[Demand]:
    """Returns what is asked of each node; `partition` has one at least."""
    nodes, own = partition.nodes, f"partition {partition.name}"
    demands: list[Demand] = []
    gpus, kind, memory = hardware.gpus_per_node, hardware.gpu_type, hardware.memory_gb_per_node
    if gpus:
        types = {name for node in nodes for name in node.gpus}
        if kind is not None and kind not in types:
            there = sorted(types - {""})
            cure = f"take {' or '.join(there)}" if there else "leave it out: the site names no types"
            raise ConfigError(f"hardware.gpu_type is {kind}, which no node of {own} has: {cure}.")
        of = f" {kind} GPUs" if kind else " GPUs"
        best = max(_gpus_of(node, kind) for node in nodes)
        demands.append(
            (
                f"hardware.gpus_per_node is {gpus}, but no node of {own} has more than {best}{of}: "
                + (f"make it {best} or less" if best else "take a partition with GPUs")
                + ".",
                lambda node: _gpus_of(node, kind) >= gpus,
            )
        )
    best = max(node.cpus for node in nodes)
    demands.append(
        (
            f"hardware.cpus_per_node is {hardware.cpus_per_node}, but a job has {best} CPUs at most on a node of "
            f"{own}: make it {best} or less.",
            lambda node: node.cpus >= hardware.cpus_per_node,
        )
    )
    if memory is not None:
        best = max(node.memory_mb for node in nodes)
        demands.append(
            (
                f"hardware.memory_gb_per_node is {memory:g}, but no node of {own} has more than {best / 1000:g} GB: "
                "make it that or less, or leave it out for all that a node has.",
                lambda node: node.memory_mb >= round(memory * 1000),
            )
        )
    if hardware.constraint is not None:
        demands.append(_constraint(hardware.constraint, nodes, own))
    return demands


def _constraint(constraint: str, nodes: Sequence[NodeKind], own: str) -> Demand:
    """Knows names with & or with | between them; of what is more than that, only the names are looked at."""
    words = set(re.findall(r"[^&|,()\[\]*!\s]+", re.sub(r"\*\d+", "", constraint)))
    there = frozenset[str]().union(*(node.features for node in nodes))
    unknown = sorted(words - there)
    named = f"the feature {unknown[0]}" if unknown else "these features together"
    cure = f"there are {', '.join(sorted(there))}" if there else "leave it out, as its nodes have none"
    refusal = f"hardware.constraint is {constraint}, but no node of {own} has {named}: {cure}."
    if re.search(r"[()\[\]*!]", constraint) or ("|" in constraint and re.search("[&,]", constraint)):
        return refusal, lambda node: not unknown
    if "|" in constraint:
        return refusal, lambda node: bool(words & node.features)
    return refusal, lambda node: words <= node.features


def _gpus_of(node: NodeKind, kind: str | None) -> int:
    return sum(node.gpus.values()) if kind is None else node.gpus.get(kind, 0)


def _asked(hardware: HardwareSettings) -> str:
    cpus, gpus = hardware.cpus_per_node, hardware.gpus_per_node
    parts = [f"{cpus} {'CPU' if cpus == 1 else 'CPUs'}"]
    if gpus:
        of = f"{hardware.gpu_type} " if hardware.gpu_type else ""
        parts.append(f"{gpus} {of}{'GPU' if gpus == 1 else 'GPUs'}")
    if hardware.memory_gb_per_node is not None:
        parts.append(f"{hardware.memory_gb_per_node:g} GB")
    if hardware.constraint is not None:
        parts.append(f"the features {hardware.constraint}")
    return ", ".join(parts[:-1]) + f" and {parts[-1]}" if len(parts) > 1 else parts[0]


def _listed(partitions: Mapping[str, Partition]) -> str:
    return ", ".join(
        f"{name} (the default)" if partition.is_default else name for name, partition in partitions.items()
    )


def _number(text: str) -> int:
    """Returns the number that `text` begins with, 0 for none; sinfo adds a + or K in some cases."""
    match = re.match(r"(\d+)(K?)", text)
    return 0 if match is None else int(match[1]) * (1024 if match[2] else 1)


def _most(size: str) -> float:
    """Returns the larger number of a range such as 1-infinite."""
    last = size.rpartition("-")[2]
    return int(last) if last.isdecimal() else math.inf


def _time(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days}-" if days else "") + f"{hours:02}:{minutes:02}:{rest:02}"
