"""Pushes the policy's weights to the inference servers.

Each pipeline stage streams its weights under Hugging Face names, in buckets of bounded size, through a process group
of its own that all servers have joined. Rank 0 does the HTTP: it announces each bucket to the servers while the
stage's leader broadcasts it. `canary.py` proves that they arrived.
"""

import contextlib
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypedDict
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sdpo_megatron.errors import ServerLost, ServerRefused
from sdpo_megatron.models.shape import ModelShape
from sdpo_megatron.rollout.client import Client
from sdpo_megatron.rollout.weight_mark import WeightMark
from sdpo_megatron.serving.weight_group import join_weight_group, open_weight_store
from sdpo_megatron.trainer.hf_weights import hf_layout, stream_hf_weights
from sdpo_megatron.trainer.parallel import ParallelState


class Bucket(TypedDict):
    """What a server must know of one bucket before its bytes arrive."""

    names: list[str]
    shapes: list[list[int]]


@dataclass(frozen=True)
class _Stage:
    """How servers reach the leader of one pipeline stage, and what it will send. Known to every rank."""

    host: str
    port: int
    buckets: list[Bucket]


def plan_buckets(layout: Sequence[tuple[str, list[int]]], limit_bytes: int, item_bytes: int) -> list[Bucket]:
    """Puts consecutive tensors together up to `limit_bytes`; a larger tensor gets a bucket of its own."""
    buckets: list[Bucket] = []
    room = 0
    for name, shape in layout:
        size = torch.Size(shape).numel() * item_bytes
        if size > room:
            buckets.append(Bucket(names=[], shapes=[]))
            room = limit_bytes
        buckets[-1]["names"].append(name)
        buckets[-1]["shapes"].append(shape)
        room -= size
    return buckets


def checksum(flat: Tensor) -> int:
    """Returns a checksum of a 1-D uint8 tensor; it depends on the bytes and on their order."""
    words = torch.nn.functional.pad(flat, (0, -flat.numel() % 4)).view(torch.int32)
    total = 0
    for i, part in enumerate(words.split(1 << 20)):
        weights = torch.arange(1, part.numel() + 1, device=part.device)
        total = (total + (i + 1) * int((part.to(torch.int64) * weights).sum())) % (1 << 61)
    return total


class WeightSync:
    """Pushes weights to the servers. All ranks construct it and call its methods together. `chunks` are this rank's
    parts of the policy; `clients` are rank 0's, empty elsewhere."""

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        shape: ModelShape,
        parallel: ParallelState,
        clients: Sequence[Client],
        *,
        dtype: torch.dtype,
        server_tp: int,
        bucket_bytes: int,
        timeout_s: float,
        mark: WeightMark,
        log: Callable[[str], None],
    ):
        self.chunks = chunks
        self.shape = shape
        self.parallel = parallel
        self.clients = clients
        self.dtype = dtype
        self.server_tp = server_tp
        self.timeout_s = timeout_s
        self.mark = mark
        self.log = log
        self.buckets = plan_buckets(hf_layout(chunks, shape), bucket_bytes, dtype.itemsize)
        self.group: dist.ProcessGroup | None = None
        self.attempt = ""
        self.stages: list[_Stage] = []

    def push(self, version: int) -> None:
        """Pushes the weights. Raises ServerLost, on every rank, where a server did not take them; it may then be called
        again.

        Raises UserError where another run has pushed to a server since the last call."""
        try:
            if self.stages:
                self._together(self._check_owner)
            else:
                self._together(self._connect)
            self._together(self._open)
            for stage in range(self.parallel.pp):
                self._together(lambda stage=stage: self._send_stage(stage, version))
            self._together(self._close)
        except ServerLost:
            self.disconnect()
            raise
        except ServerRefused as error:
            raise ServerRefused(
                f"{error}. Another run that pushes to the same server would be a cause."
            ) from error

    def leave(self) -> None:
        """Has the servers, which may outlive this trainer, forget its process groups."""
        for client in self.clients:
            for stage in range(len(self.stages)):
                # a lost server has nothing left to forget
                with contextlib.suppress(ServerLost):
                    client.destroy_update_group(self._group_name(stage))
        self.disconnect()

    def disconnect(self) -> None:
        """Forgets the process groups; the next push makes new ones."""
        if self.group is not None:
            dist.destroy_process_group(self.group)
        self.group, self.stages = None, []

    def _together(self, part: Callable[[], None]) -> None:
        """Runs `part` on every rank. A server that one of them lost, also from a weight group, is lost to all."""

        def attempt() -> None:
            try:
                part()
            # gloo and NCCL raise RuntimeError where the other end of a group is gone
            except (ServerLost, RuntimeError) as error:
                reason = str(error).splitlines()[0]
                raise ServerLost(f"the weights could not be pushed: {reason}") from error

        self.parallel.everywhere(attempt)

    def _connect(self) -> None:
        """One process group per pipeline stage: its leader is rank 0, then come all servers' ranks."""
        self.attempt = self.parallel.share(secrets.token_hex(8))
        address, store = None, None
        # servers that all run on this machine are met on the loopback interface, others on the one that leads to them
        hosts = self.parallel.share([urlsplit(client.url).hostname for client in self.clients])
        if self.parallel.leads_stage:
            host = _own_address(hosts[0])
            store = open_weight_store(host, self.timeout_s)
            address = {
                "stage": self.parallel.pp_rank,
                "host": host,
                "port": store.port,
                "buckets": self.buckets,
            }
        addresses = sorted(
            (a for a in self.parallel.gather(address) if a is not None), key=lambda a: a["stage"]
        )
        stages = [_Stage(a["host"], a["port"], a["buckets"]) for a in addresses]
        world_size = 1 + self.server_tp * len(hosts)
        backend: Literal["gloo", "nccl"] = "nccl" if self.parallel.device.type == "cuda" else "gloo"
        with ThreadPoolExecutor(max(1, len(stages) * len(self.clients))) as pool:
            joining = [
                pool.submit(
                    client.init_update_group,
                    host=stage.host,
                    port=stage.port,
                    rank_offset=1 + i * self.server_tp,
                    world_size=world_size,
                    group_name=self._group_name(s),
                    backend=backend,
                )
                for s, stage in enumerate(stages)
                for i, client in enumerate(self.clients)
            ]
            if store is not None:
                name = self._group_name(self.parallel.pp_rank)
                self.group = join_weight_group(store, world_size, 0, name, backend, self.timeout_s)
            for future in joining:
                future.result()
        self.stages = stages

    def _check_owner(self) -> None:
        for client in self.clients:
            self.mark.read(client.model_info()["weight_version"], client.url)

    def _open(self) -> None:
        for client in self.clients:
            client.pause()
            client.flush_cache()
            client.begin_update()

    def _close(self) -> None:
        for client in self.clients:
            client.end_update()
            client.flush_cache()
            client.resume()

    def _send_stage(self, stage: int, version: int) -> None:
        """Sends a stage's buckets. After a failure the remaining ones are still gathered, so that no tensor-parallel
        rank waits in vain."""
        sends = self.parallel.pp_rank == stage and self.parallel.is_first_replica
        flats = self._flat_buckets() if sends else None
        buckets = self.stages[stage].buckets
        is_last_stage = stage == self.parallel.pp - 1
        failure: Exception | None = None
        for i, bucket in enumerate(buckets):
            flat = next(flats) if flats else None
            if failure is not None:
                continue
            mark = self.mark.write(version) if is_last_stage and i == len(buckets) - 1 else None
            try:
                self._send_bucket(stage, bucket, flat, mark)
            except (ServerLost, RuntimeError) as error:
                failure = error
            if flat is not None and self.parallel.leads_stage:
                self.log(
                    f"weights {version} stage {stage} bucket {i + 1} of {len(buckets)}: "
                    f"{len(bucket['names'])} tensors, {flat.numel()} bytes, checksum {checksum(flat):016x}"
                )
        if failure is not None:
            raise failure

    def _send_bucket(self, stage: int, bucket: Bucket, flat: Tensor | None, mark: str | None) -> None:
        with ThreadPoolExecutor(max(1, len(self.clients))) as pool:
            announced = [
                pool.submit(
                    client.update_from_distributed,
                    names=bucket["names"],
                    dtypes=[str(self.dtype).removeprefix("torch.")] * len(bucket["names"]),
                    shapes=bucket["shapes"],
                    group_name=self._group_name(stage),
                    version=mark,
                )
                for client in self.clients
            ]
            if flat is not None and self.group is not None:
                try:
                    dist.broadcast(flat, src=0, group=self.group)
                except RuntimeError as error:
                    raise _first_failure(announced) or error from None
            for future in announced:
                future.result()

    def _group_name(self, stage: int) -> str:
        """Returns a name that is new at every attempt, also to a server that an earlier trainer has used."""
        return f"policy-{self.attempt}-{stage}"

    def _flat_buckets(self) -> Iterator[Tensor]:
        """The bytes of each bucket, on the stage's tensor-parallel ranks, which gather together."""
        tensors = stream_hf_weights(self.chunks, self.shape, self.parallel)
        for bucket in self.buckets:
            parts = []
            for name in bucket["names"]:
                streamed, tensor = next(tensors)
                if streamed != name:
                    raise AssertionError(f"The stream yields {streamed} where the plan has {name}.")
                parts.append(tensor.to(self.dtype).contiguous().view(-1).view(torch.uint8))
            yield torch.cat(parts)


def _first_failure(calls: Sequence[Future[None]]) -> ServerLost | None:
    """What a server answered says more than that its end of the group is gone."""
    failures = [str(failure) for failure in (call.exception() for call in calls) if failure is not None]
    return ServerLost(failures[0]) if failures else None


def _own_address(server_host: str) -> str:
    """The address of this machine on the route to the server; nothing is sent."""
    family = socket.AF_INET6 if ":" in server_host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((server_host, 9))
        return probe.getsockname()[0]
