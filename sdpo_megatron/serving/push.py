"""Pushes the policy's weights to the inference servers.

Each pipeline stage streams its weights under Hugging Face names, in buckets of bounded size, through a process group
of its own that all servers have joined. Rank 0 does the HTTP: it announces each bucket to the servers while the
stage's leader broadcasts it. Afterwards the servers say by hashes what they hold (`checksums.py`).
"""

import contextlib
import hashlib
import json
import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal, TypedDict, TypeVar
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from sdpo_megatron.errors import RunFailed, ServerLost, ServerRefused
from sdpo_megatron.models.shape import ModelShape
from sdpo_megatron.rollout.client import Client
from sdpo_megatron.rollout.weight_mark import WeightMark
from sdpo_megatron.serving.calls import Calls
from sdpo_megatron.serving.checksums import SentChecksums, differing
from sdpo_megatron.serving.memory_release import MemoryRelease, give_unused_memory_back
from sdpo_megatron.serving.weight_group import join_weight_group, open_weight_store, own_address
from sdpo_megatron.stopping import Stopped
from sdpo_megatron.trainer.hf_weights import hf_layout, stream_hf_weights
from sdpo_megatron.trainer.parallel import ParallelState

Result = TypeVar("Result")
ANSWER_S = 1.0
"""How long a server that has left a weight group may take to say why."""


class Bucket(TypedDict):
    """What a server must know of one bucket before its bytes arrive."""

    names: list[str]
    shapes: list[list[int]]


class Stage(TypedDict):
    """How servers reach the leader of one pipeline stage, and what it will send. Known to every rank."""

    host: str
    port: int
    buckets: list[Bucket]


@dataclass(eq=False)
class WeightSync:
    """Pushes weights to the servers. All ranks construct it and call its methods together."""

    chunks: Sequence[nn.Module]
    """This rank's parts of the policy."""
    shape: ModelShape
    parallel: ParallelState
    clients: Sequence[Client]
    """Rank 0's, empty elsewhere."""
    _: KW_ONLY
    dtype: torch.dtype
    server_tp: int
    bucket_bytes: int
    timeout_s: float
    mark: WeightMark
    calls: Calls
    log: Callable[[str], None]
    release: MemoryRelease | None = None
    """Of servers that give their memory to the trainer between a rollout and the push."""
    buckets: list[Bucket] = field(init=False)
    sent: SentChecksums = field(init=False)
    """Of the last push."""
    group: dist.ProcessGroup | None = field(default=None, init=False)
    attempt: str = field(default="", init=False)
    stages: list[Stage] = field(default_factory=list, init=False)
    digest: str = field(default="", init=False)
    """Of the weights that the servers have, the same in a run that goes on from them; empty while that is open."""
    cannot_prove: set[str] = field(default_factory=set, init=False)
    """Servers that were named already because they do not say what they hold."""

    def __post_init__(self) -> None:
        self.buckets = plan_buckets(
            hf_layout(self.chunks, self.shape), self.bucket_bytes, self.dtype.itemsize
        )

    def push(self, version: int) -> bool:
        """Pushes the weights. Returns whether the servers' hashes prove that they hold them, which older servers cannot
        say. Raises ServerLost, on every rank, where a server did not take them; it may then be called again.

        Raises RunFailed where a server holds other weights than it was sent, UserError where another run has pushed to
        it since the last call, Stopped where the run is asked to stop meanwhile; servers are then left in the middle of
        an update."""
        self.digest = ""
        if self.release is not None:
            # on all ranks before the first server wants it
            self.parallel.everywhere(give_unused_memory_back)
        try:
            if self.stages:
                self._together(self._check_owner)
            else:
                self._connect()
            self._together(self._open)
            self.sent = SentChecksums(self.shape, self.server_tp)
            for stage in range(self.parallel.pp):
                self._together(lambda stage=stage: self._send_stage(stage, version))
            self._together(self._close)
            return self._verify(version)
        except (ServerLost, Stopped):
            self.disconnect()
            raise
        except ServerRefused as error:
            raise ServerRefused(
                f"{error}. Another run that pushes to the same server would be a cause."
            ) from error

    def release_servers(self) -> None:
        """Has the servers release their memory until the next push, where they have a `release`. Raises ServerLost, on
        every rank."""
        if self.release is not None:
            begin = self.release.begin
            self._together(
                lambda: self.calls.all([self.calls.start(begin, client) for client in self.clients])
            )

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

    def _verify(self, version: int) -> bool:
        """Has the servers say what they hold. All ranks must call it: each stage knows what it has sent."""
        by_stage = self.parallel.gather(self.sent.by_rank if self.parallel.leads_stage else None)
        sent = [
            {name: checksum for stage in by_stage if stage for name, checksum in stage[rank].items()}
            for rank in range(self.server_tp)
        ]
        self.digest = hashlib.sha256(json.dumps(sent, sort_keys=True).encode()).hexdigest()
        proven = self._together(lambda: [self._holds(client, sent, version) for client in self.clients])
        return self.parallel.share(all(proven))

    def _holds(self, client: Client, sent: list[dict[str, str]], version: int) -> bool:
        held = self.calls.one(client.weight_checksums)
        reason = "has no /weights_checker that we know: it is of another version"
        if held is not None:
            try:
                wrong = differing(sent, held)
            except KeyError as error:
                reason = f"does not list its parameter {error.args[0]}"
            else:
                if wrong:
                    raise RunFailed(
                        f"After the push of weights version {version}, {client.url} holds other values than it was "
                        f"sent in {len(wrong)} of {len(sent[0])} parameters, the first being {wrong[0]}: a bug of the "
                        "server's or ours, or a server of another precision than model.dtype."
                    )
                return True
        if client.url not in self.cannot_prove:
            self.cannot_prove.add(client.url)
            self.log(
                f"{client.url} {reason}; that it holds the weights shows in its log-probabilities alone."
            )
        return False

    def _together(self, part: Callable[[], Result]) -> Result:
        """Returns what `part`, run on every rank, returns here. A server that one of them lost, also from a weight
        group, is lost to all."""

        def attempt() -> Result:
            try:
                return part()
            # gloo and NCCL raise RuntimeError where the other end of a group is gone
            except (ServerLost, RuntimeError) as error:
                reason = str(error).splitlines()[0]
                url = error.url if isinstance(error, ServerLost) else ""
                raise ServerLost(f"the weights could not be pushed: {reason}", url) from error

        return self.parallel.everywhere(attempt)

    def _connect(self) -> None:
        """One process group per pipeline stage: its leader is rank 0, then come all servers' ranks."""
        self.attempt = self.parallel.share(secrets.token_hex(8))
        hosts = self.parallel.share([urlsplit(client.url).hostname for client in self.clients])

        def open_store() -> TCPStore | None:
            return (
                open_weight_store(own_address(hosts), self.timeout_s) if self.parallel.leads_stage else None
            )

        store = self._together(open_store)
        own = None
        if store is not None:
            own = self.parallel.pp_rank, Stage(host=store.host, port=store.port, buckets=self.buckets)
        leaders = dict(one for one in self.parallel.gather(own) if one is not None)
        stages = [leaders[stage] for stage in range(self.parallel.pp)]
        self._together(lambda: self._join(stages, len(hosts), store))
        self.stages = stages

    def _join(self, stages: Sequence[Stage], servers: int, store: TCPStore | None) -> None:
        world_size = 1 + self.server_tp * servers
        backend: Literal["gloo", "nccl"] = "nccl" if self.parallel.device.type == "cuda" else "gloo"
        joining = [
            self.calls.start(
                client.init_update_group,
                host=stage["host"],
                port=stage["port"],
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
            joining.append(
                self.calls.start(join_weight_group, store, world_size, 0, name, backend, self.timeout_s)
            )
        joined = self.calls.all(joining)
        self.group = joined[-1] if store is not None else None

    def _check_owner(self) -> None:
        for client in self.clients:
            self.mark.read(client.model_info()["weight_version"], client.url)

    def _open(self) -> None:
        for client in self.clients:
            self.calls.one(client.pause)
            self.calls.one(client.flush_cache)
            if self.release is not None:
                self.calls.one(self.release.take_back_weights, client)
            self.calls.one(client.begin_update)

    def _close(self) -> None:
        for client in self.clients:
            self.calls.one(client.end_update)
            self.calls.one(client.flush_cache)
            if self.release is not None:
                self.calls.one(self.release.take_back_cache, client)
            self.calls.one(client.resume)

    def _send_stage(self, stage: int, version: int) -> None:
        """Sends a stage's buckets. After a failure the remaining ones are still gathered, so that no tensor-parallel
        rank waits in vain."""
        sends = self.parallel.pp_rank == stage and self.parallel.is_first_replica
        flats = self._flat_buckets() if sends else None
        buckets = self.stages[stage]["buckets"]
        is_last_stage = stage == self.parallel.pp - 1
        failure: Exception | None = None
        for i, bucket in enumerate(buckets):
            flat = next(flats) if flats else None
            if self.parallel.any(self.calls.stop.requested):
                failure = failure or Stopped()
            if failure is not None:
                continue
            mark = self.mark.write(version) if is_last_stage and i == len(buckets) - 1 else None
            try:
                self._send_bucket(stage, bucket, flat, mark)
            except (ServerLost, RuntimeError, Stopped) as error:
                failure = error
            if flat is not None and self.parallel.leads_stage:
                self.log(
                    f"weights {version} stage {stage} bucket {i + 1} of {len(buckets)}: "
                    f"{len(bucket['names'])} tensors, {flat.numel()} bytes"
                )
        if failure is not None:
            raise failure

    def _send_bucket(self, stage: int, bucket: Bucket, flat: Tensor | None, mark: str | None) -> None:
        announced = [
            self.calls.start(
                client.update_from_distributed,
                names=bucket["names"],
                dtypes=[str(self.dtype).removeprefix("torch.")] * len(bucket["names"]),
                shapes=bucket["shapes"],
                group_name=self._group_name(stage),
                version=mark,
            )
            for client in self.clients
        ]
        sent = []
        if flat is not None and self.group is not None:
            sent = [self.calls.start(_broadcast, flat, self.group)]
        try:
            self.calls.all([*announced, *sent])
        except RuntimeError as error:
            raise _first_failure(announced) or error from None

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
                tensor = tensor.to(self.dtype).contiguous()
                if self.parallel.leads_stage:
                    self.sent.add(name, tensor)
                parts.append(tensor.view(-1).view(torch.uint8))
            yield torch.cat(parts)


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


def _broadcast(flat: Tensor, group: dist.ProcessGroup) -> None:
    # a thread begins with the machine's first GPU
    with torch.cuda.device(flat.device) if flat.is_cuda else contextlib.nullcontext():
        dist.broadcast(flat, src=0, group=group)


def _first_failure(calls: Sequence[Future]) -> ServerLost | None:
    """What a server answered says more than that its end of the group is gone."""
    done, _ = wait(calls, timeout=ANSWER_S)
    failures = [failure for failure in (call.exception() for call in done) if failure is not None]
    return ServerLost(str(failures[0]), getattr(failures[0], "url", "")) if failures else None
