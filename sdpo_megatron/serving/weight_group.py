"""The process group over which weights travel from the trainer to a server.

SGLang builds its side with a copy of torch's `init_process_group` that leaves the default group alone
(`sglang.srt.utils.init_custom_process_group`). Both sides must build alike, from a store under the same
prefix; this is the trainer's side. The trainer is rank 0 of the group, which also makes it the one that
holds the store:

    store = open_weight_store("127.0.0.1", timeout_s)
    # from a thread: client.init_update_group(host="127.0.0.1", port=store.port, rank_offset=1, ...)
    group = join_weight_group(store, world_size, 0, name, "gloo", timeout_s)
"""

import socket
from collections.abc import Sequence
from datetime import timedelta
from ipaddress import ip_address
from typing import Literal

import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed import distributed_c10d as c10d

from sdpo_megatron.errors import UserError


def open_weight_store(host: str, timeout_s: float) -> TCPStore:
    """Returns a store that listens on `host` alone, on a free port (its `port`). Nothing but the group's ranks may
    reach it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listener:
        return TCPStore(
            host,
            listener.getsockname()[1],
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            master_listen_fd=listener.detach(),
        )


def join_weight_group(
    store: c10d.Store,
    world_size: int,
    rank: int,
    name: str,
    backend: Literal["gloo", "nccl"],
    timeout_s: float,
) -> dist.ProcessGroup:
    """Returns once all `world_size` ranks have joined the group `name`. Works with and without a default
    group.

    `name` must be new to the server as well as to this process. `timeout_s` bounds the joining and each
    broadcast. End it with `torch.distributed.destroy_process_group(group)`."""
    timeout = timedelta(seconds=timeout_s)
    group, _ = c10d._new_process_group_helper(
        world_size,
        rank,
        # not a subset of the default group
        [],
        c10d.Backend(backend),
        c10d.PrefixStore(name, store),
        group_name=c10d.GroupName(name),
        timeout=timeout,
    )
    assert isinstance(group, dist.ProcessGroup)
    c10d._world.pg_group_ranks[group] = {member: member for member in range(world_size)}
    return group


def own_address(server_hosts: Sequence[str]) -> str:
    """Returns the address of this machine at which all servers reach it: the loopback one where all of them run here,
    else that on the route to those that do not. Nothing is sent.

    Raises UserError where several networks lead to them."""
    found = {host: _route(host) for host in server_hosts}
    remote = {host: own for host, own in found.items() if not ip_address(own).is_loopback}
    if len(set(remote.values())) > 1:
        ways = ", ".join(f"{host} from {own}" for host, own in remote.items())
        raise UserError(
            f"The servers of server.urls are reached over several networks ({ways}), but weights travel over one: give "
            "them by addresses of the same network."
        )
    return next(iter({**remote, **found}.values()))


def _route(host: str) -> str:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        return probe.getsockname()[0].split("%")[0]
