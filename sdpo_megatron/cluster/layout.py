"""Who trains and who serves on which node and GPU, and where they listen: a pure function of hardware and settings.

Ranks of one tensor-parallel group, and those of one server, share a node. Node 0, the first host, is the master."""

from collections.abc import Sequence
from dataclasses import dataclass

from sdpo_megatron.cluster.hardware import HardwareSettings
from sdpo_megatron.config import ParallelSettings
from sdpo_megatron.errors import ConfigError

FIRST_PORT, PORTS_EACH, BLOCKS = 15_000, 32, 500
"""Ports of a job and attempt, below those that systems hand out by themselves."""


@dataclass(frozen=True, kw_only=True)
class RankPlace:
    rank: int
    node: int
    gpu: int | None
    """Of the node; None on CPUs."""


@dataclass(frozen=True, kw_only=True)
class ServerPlace:
    index: int
    node: int
    gpus: tuple[int, ...]
    """Of the node, one per tensor-parallel rank of the server; empty on CPUs."""
    port: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    ranks: tuple[RankPlace, ...]
    servers: tuple[ServerPlace, ...]
    master_port: int

    @property
    def trainer_nodes(self) -> list[int]:
        return sorted({place.node for place in self.ranks})

    @property
    def ranks_per_node(self) -> int:
        return len(self.ranks) // len(self.trainer_nodes)

    def urls(self, hosts: Sequence[str]) -> list[str]:
        """Returns the servers' addresses; `hosts` are the nodes' names."""
        return [f"http://{hosts[place.node]}:{place.port}" for place in self.servers]


def plan_layout(
    hardware: HardwareSettings, parallel: ParallelSettings, server_tp: int, job: int = 0, attempt: int = 0
) -> Layout:
    """Returns the layout of a trainer of dp * pp * tp ranks and of servers of `server_tp` GPUs each. `job` and
    `attempt` choose the ports: those of another attempt may still be held by connections of the last.

    Raises ConfigError where they do not fill the hardware, or do not fit it."""
    gpus, nodes, tp = range(hardware.gpus_per_node), range(hardware.nodes), parallel.tp
    training = hardware.nodes - hardware.server_nodes
    # what split_node or separate_nodes sets apart for servers (check_placement allows no other to); 0: they have all
    trains = gpus[hardware.server_gpus_per_node :]
    serves = gpus[: hardware.server_gpus_per_node or None]
    serving = nodes[training:] or nodes
    world = parallel.dp * parallel.pp * tp
    per_node = _ranks_per_node(world, training, len(trains), on_gpus=len(gpus) > 0, group=tp * parallel.pp)
    if per_node % tp:
        raise ConfigError(
            f"parallel.tp is {tp}, but each node trains with {per_node} ranks, and a tensor-parallel group must lie on "
            f"one node: take a parallel.tp that divides {per_node}."
        )
    ranks = tuple(
        RankPlace(rank=rank, node=rank // per_node, gpu=trains[rank % per_node] if gpus else None)
        for rank in range(world)
    )
    first_port = first_port_of(job, attempt)
    servers = tuple(
        ServerPlace(index=index, node=node, gpus=on, port=first_port + 1 + local)
        for index, (node, local, on) in enumerate(
            (node, local, on) for node in serving for local, on in enumerate(_server_gpus(serves, server_tp))
        )
    )
    return Layout(ranks=ranks, servers=servers, master_port=first_port)


def first_port_of(job: int, attempt: int) -> int:
    """Returns the first of the PORTS_EACH ports of an attempt of a job; the next attempt has others."""
    return FIRST_PORT + (job * 131 + attempt * 7) % BLOCKS * PORTS_EACH


def _ranks_per_node(world: int, nodes: int, gpus: int, *, on_gpus: bool, group: int) -> int:
    if not on_gpus:
        if world % nodes:
            raise ConfigError(
                f"The trainer has {world} ranks (parallel.dp * pp * tp), which {nodes} nodes cannot share evenly: "
                f"change parallel.dp, or hardware.nodes."
            )
        return world // nodes
    there = nodes * gpus
    if world != there:
        fitting = there % group == 0
        cure = (
            f"set parallel.dp={there // group}"
            if fitting
            else f"parallel.tp * pp = {group} must divide {there}"
        )
        raise ConfigError(
            f"The trainer has {world} ranks (parallel.dp * pp * tp), but the hardware has {there} GPUs for it "
            f"({nodes} {'node' if nodes == 1 else 'nodes'} with {gpus}): {cure}, or change hardware.nodes."
        )
    return gpus


def _server_gpus(gpus: Sequence[int], server_tp: int) -> list[tuple[int, ...]]:
    """Returns the GPUs of each server of one node."""
    if not gpus:
        return [()]
    if len(gpus) % server_tp:
        raise ConfigError(
            f"server.tp is {server_tp}, but each node that serves has {len(gpus)} GPUs for servers, and a server must "
            f"lie on one node: take a server.tp that divides {len(gpus)}."
        )
    return [tuple(gpus[start : start + server_tp]) for start in range(0, len(gpus), server_tp)]
