"""Where this rank stands in the process grid, as an object that is handed on.

The only file that names megatron's global `parallel_state`: it is initialised once here, because parts of
megatron-core still read it, and every other file takes a `ParallelState`.
"""

import json
import logging
import os
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist

from sdpo_megatron.config import ParallelSettings
from sdpo_megatron.errors import (
    ConfigError,
    PeerLost,
    PolicyBroken,
    RunFailed,
    ServerLost,
    ServerRefused,
    TeacherRefused,
    UserError,
)
from sdpo_megatron.stopping import Stopped
from sdpo_megatron.trainer import cpu_platform
from sdpo_megatron.trainer.rendezvous import join

cpu_platform.install()
warnings.filterwarnings("ignore", module=r"megatron\.core\..*")
warnings.filterwarnings("ignore", message=r".*(Transformer Engine|Apex|torch\.jit|torch\.distributed\.).*")
warnings.filterwarnings("ignore", message=r".*deprecating ShardedTensor.*")
logging.getLogger("megatron.core").setLevel(logging.ERROR)

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402

Result = TypeVar("Result")

SHARED_ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (
        *(ConfigError, TeacherRefused, UserError, RunFailed, PeerLost, PolicyBroken),
        *(ServerRefused, ServerLost, Stopped),
    )
}
"""What one rank may raise for all of them; any other exception is a bug of the rank that raises it."""

PATIENCE = timedelta(days=20)
"""How long ranks wait for rank 0, which may sample and grade for hours: as good as for ever, since a rank that ends
breaks its connections, and whoever started the ranks sees to those that hang. More milliseconds would not fit into 31
bits."""


@dataclass(frozen=True, kw_only=True)
class ParallelState:
    """Sizes, ranks and process groups of every kind of parallelism."""

    device: torch.device
    rank: int
    world_size: int
    groups: ProcessGroupCollection
    """megatron-core's collection: tp, pp, dp, dp_cp, cp, ep, embd, ..."""
    cpu_group: dist.ProcessGroup
    """The group of all ranks, over gloo: for lists and flags, whatever the device."""
    sequence_parallel: bool
    replica_group: dist.ProcessGroup
    """The ranks with this one's data-parallel rank, over gloo: they compute the same tokens."""
    replicas: list[list[int]]
    """The ranks of each data-parallel rank, ascending; the first of them hands on what rank 0 has for all."""
    owners: list[int]
    """For each data-parallel rank, the rank that counts its tokens: see `owns_tokens`."""
    vpp: int
    """Model chunks of each pipeline rank, which holds all of them: there is no rank along this axis."""
    on_progress: Callable[[], None] = lambda: None
    """Called before each micro-batch."""

    @property
    def tp(self) -> int:
        return self.groups.tp.size()

    @property
    def pp(self) -> int:
        return self.groups.pp.size()

    @property
    def dp(self) -> int:
        return self.groups.dp.size()

    @property
    def cp(self) -> int:
        return self.groups.cp.size()

    @property
    def ep(self) -> int:
        return self.groups.ep.size()

    @property
    def tp_rank(self) -> int:
        return self.groups.tp.rank()

    @property
    def pp_rank(self) -> int:
        return self.groups.pp.rank()

    @property
    def dp_rank(self) -> int:
        return self.groups.dp.rank()

    @property
    def cp_rank(self) -> int:
        return self.groups.cp.rank()

    @property
    def ep_rank(self) -> int:
        return self.groups.ep.rank()

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1

    @property
    def is_main(self) -> bool:
        """The rank that does the list work and the HTTP."""
        return self.rank == 0

    @property
    def is_first_replica(self) -> bool:
        """Whether this is the first of the data- and context-parallel ranks, which all hold the same weights."""
        return self.groups.dp_cp.rank() == 0

    @property
    def leads_stage(self) -> bool:
        """Whether this is the one rank of its pipeline stage that speaks for it."""
        return self.tp_rank == 0 and self.is_first_replica

    @property
    def owns_tokens(self) -> bool:
        """Whether this is the one rank that counts the tokens of its micro-batches: each data- and context-parallel
        rank has tokens of its own, while the tensor-parallel ranks of the last stage all know the same of them."""
        return self.is_last_stage and self.tp_rank == 0

    def share(self, value: Any) -> Any:
        """Returns rank 0's JSON-serialisable value, on every rank."""
        payload = np.frombuffer(bytearray(json.dumps(value).encode()), np.uint8) if self.is_main else None
        shared = _broadcast(payload, src=0, group=self.cpu_group)
        return value if self.is_main else json.loads(shared.tobytes())

    def scatter_bytes(self, payloads: Sequence[np.ndarray]) -> np.ndarray:
        """Returns what rank 0 has for this rank's data-parallel rank, uint8 [bytes]: the bytes leave rank 0 once.

        Rank 0 gives one array for each data-parallel rank; what other ranks give is not looked at."""
        leaders = [ranks[0] for ranks in self.replicas]
        own = payloads[self.dp_rank] if self.is_main else None
        if self.is_main:
            sent = []
            for leader, payload in zip(leaders, payloads, strict=True):
                if leader != self.rank:
                    sent.append(dist.isend(torch.tensor([payload.size]), leader, group=self.cpu_group))
                    sent.append(dist.isend(torch.from_numpy(payload), leader, group=self.cpu_group))
            for work in sent:
                work.wait()  # type: ignore[union-attr]
        elif self.rank in leaders:
            size = torch.zeros(1, dtype=torch.int64)
            dist.recv(size, 0, group=self.cpu_group)
            received = torch.empty(int(size), dtype=torch.uint8)
            dist.recv(received, 0, group=self.cpu_group)
            own = received.numpy()
        return _broadcast(own, src=leaders[self.dp_rank], group=self.replica_group)

    def gather_tokens(self, values_T: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
        """Returns, on rank 0, the float32 numbers that each data-parallel rank has of its tokens, by data-parallel
        rank; an empty list on other ranks. Rank 0 knows how many each has."""
        if self.rank == self.owners[self.dp_rank] and not self.is_main:
            dist.send(values_T.contiguous(), 0, group=self.cpu_group)
        if not self.is_main:
            return []
        received = []
        for owner, size in zip(self.owners, sizes, strict=True):
            if owner == self.rank:
                received.append(values_T)
            else:
                received.append(torch.empty(size))
                dist.recv(received[-1], owner, group=self.cpu_group)
        return received

    def everywhere(self, work: Callable[[], Result]) -> Result:
        """Runs `work` on every rank and returns this rank's result, or fails on every rank alike.

        Where `work` raises one of SHARED_ERRORS on some ranks, all ranks raise that of the first such rank: the same
        kind with the same message. Where it raises anything else, that rank raises it, and the others PeerLost.
        `work` must not leave another rank waiting in a collective of its own.
        """
        result: Result | None = None
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:
            failure = error
        if self.any(failure is not None):
            self._fail_alike(failure)
        return cast(Result, result)

    def _fail_alike(self, own: Exception | None) -> NoReturn:
        described = None if own is None else [type(own).__name__, getattr(own, "message", str(own))]
        by_rank = [(rank, *found) for rank, found in enumerate(self.gather(described)) if found is not None]
        bugs = [failure for failure in by_rank if failure[1] not in SHARED_ERRORS]
        rank, kind, message = (bugs or by_rank)[0]
        if own is not None and (rank == self.rank or type(own).__name__ not in SHARED_ERRORS):
            raise own
        if bugs:
            first_line = (message.splitlines() or [""])[0]
            raise PeerLost(f"Rank {rank} failed ({kind}: {first_line}); its log says more.") from own
        raise SHARED_ERRORS[kind](message) from own

    def any(self, flag: bool) -> bool:
        """Returns whether `flag` is set on at least one rank."""
        return bool(self.largest(float(flag)))

    def largest(self, value: float) -> float:
        value_1 = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(value_1, op=dist.ReduceOp.MAX, group=self.cpu_group)
        return float(value_1)

    def gather(self, value: Any) -> list[Any]:
        """Returns every rank's JSON-serialisable value, by rank, on every rank."""
        payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([payload.numel()]), group=self.cpu_group)
        longest = int(max(sizes))
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: payload.numel()] = payload
        buffers = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.world_size)]
        dist.all_gather(buffers, padded, group=self.cpu_group)
        return [
            json.loads(buffer[: int(size)].numpy().tobytes())
            for size, buffer in zip(sizes, buffers, strict=True)
        ]

    def owned_total(self, values_T: torch.Tensor) -> torch.Tensor:
        """Returns the element-wise sum of a CPU tensor [T] over the ranks that count tokens, on every rank."""
        total_T = values_T if self.owns_tokens else torch.zeros_like(values_T)
        dist.all_reduce(total_T, group=self.cpu_group)
        return total_T

    def barrier(self) -> None:
        dist.barrier(group=self.cpu_group)


def _broadcast(payload: np.ndarray | None, src: int, group: dist.ProcessGroup) -> np.ndarray:
    """Returns the bytes of rank `src` on every rank of the group; only that rank has a payload."""
    size = torch.tensor([0 if payload is None else payload.size], dtype=torch.int64)
    dist.broadcast(size, src=src, group=group)
    buffer = torch.empty(int(size), dtype=torch.uint8) if payload is None else torch.from_numpy(payload)
    dist.broadcast(buffer, src=src, group=group)
    return buffer.numpy()


def initialize(
    settings: ParallelSettings,
    *,
    device: torch.device,
    seed: int,
    timeout_s: float = 7200.0,
    rendezvous: Path | None = None,
    on_progress: Callable[[], None] = lambda: None,
) -> ParallelState:
    """Joins the default process group (rank variables as torchrun sets them) and lays out the grid. `timeout_s` bounds
    each collective of the model's own groups. Ranks of one machine meet in the file `rendezvous`, which must be new;
    those of several by MASTER_ADDR and MASTER_PORT; a single one meets nobody."""
    if not dist.is_initialized():
        join("nccl" if device.type == "cuda" else "gloo", timedelta(seconds=timeout_s), rendezvous)
    parallel_state.initialize_model_parallel(
        settings.tp,
        settings.pp,
        virtual_pipeline_model_parallel_size=settings.vpp if settings.vpp > 1 else None,
        context_parallel_size=settings.cp,
        expert_model_parallel_size=settings.ep,
        distributed_timeout_minutes=int(timeout_s // 60) + 1,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    cpu_group: Any = dist.new_group(backend="gloo", timeout=PATIENCE)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    # megatron's order of ranks is its own affair: each says where it stands
    own = torch.tensor([groups.dp.rank(), groups.pp.rank() == groups.pp.size() - 1 and groups.tp.rank() == 0])
    places = [torch.zeros_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(places, own, group=cpu_group)
    replicas: list[list[int]] = [[] for _ in range(groups.dp.size())]
    owners = [0] * groups.dp.size()
    for rank, (dp_rank, owns) in enumerate(torch.stack(places).tolist()):
        replicas[dp_rank].append(rank)
        owners[dp_rank] = rank if owns else owners[dp_rank]
    # every rank takes part in making each group
    replica_groups: list[Any] = [dist.new_group(r, backend="gloo", timeout=PATIENCE) for r in replicas]
    return ParallelState(
        device=device,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        groups=groups,
        cpu_group=cpu_group,
        replica_group=replica_groups[groups.dp.rank()],
        replicas=replicas,
        owners=owners,
        sequence_parallel=settings.sequence_parallel,
        vpp=settings.vpp,
        on_progress=on_progress,
    )


def shut_down() -> None:
    """Leaves the grid; a process may then lay out another one (tests do)."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def own_device(kind: str) -> torch.device:
    """Returns the rank's device: of a machine's GPUs, the one with the rank's local number."""
    if kind == "cpu":
        return torch.device("cpu")
    # `rank` has checked that it is there
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
