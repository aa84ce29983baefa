"""What ranks run: pushes to a server, right and wrong ones."""

from itertools import pairwise
from pathlib import Path

import httpx
import pytest
import torch

from sdpo_megatron.config import ParallelSettings
from sdpo_megatron.errors import RunFailed, ServerRefused, UserError
from sdpo_megatron.models.shape import read_model_shape
from sdpo_megatron.rollout.client import Client
from sdpo_megatron.rollout.weight_mark import WeightMark
from sdpo_megatron.serving.calls import Calls
from sdpo_megatron.serving.canary import FLOAT32, Canary, Noise
from sdpo_megatron.serving.memory_release import MemoryRelease
from sdpo_megatron.serving.push import WeightSync
from sdpo_megatron.stopping import Stopped, StopRequest
from sdpo_megatron.trainer.hf_weights import load_hf_weights
from sdpo_megatron.trainer.model import build_model
from sdpo_megatron.trainer.parallel import initialize
from sdpo_megatron.trainer.score import Head, Packer, Scorer, in_float32

BUCKET_BYTES = 200_000
CANARY = list(range(5, 69))


class DropsABucket(WeightSync):
    def _send_bucket(self, stage, bucket, flat, mark):
        if not (stage == 0 and bucket == self.stages[0]["buckets"][1]):
            super()._send_bucket(stage, bucket, flat, mark)


class SwapsTwoTensors(WeightSync):
    """Key and value projection of each layer: the same shape, next to each other in a bucket."""

    def _flat_buckets(self):
        swapped = 0
        for bucket, flat in zip(self.buckets, super()._flat_buckets(), strict=True):
            sizes = [self.dtype.itemsize * torch.Size(shape).numel() for shape in bucket["shapes"]]
            parts = list(flat.split(sizes))
            for i, names in enumerate(pairwise(bucket["names"])):
                if [name.split(".")[-2] for name in names] == ["k_proj", "v_proj"]:
                    parts[i], parts[i + 1] = parts[i + 1], parts[i]
                    swapped += 1
            yield torch.cat(parts)
        assert swapped


class SendsTheOldWeights(WeightSync):
    """As a trainer that streams before its optimizer has written."""

    def _flat_buckets(self):
        for flat in super()._flat_buckets():
            bits = flat.view(self.dtype)
            yield (bits / 1.03).to(self.dtype).view(torch.uint8)


class SendsAnotherType(WeightSync):
    """Names float32 and sends it, to a server that computes in bfloat16."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **(options | {"dtype": torch.float32}))


WRONG = [DropsABucket, SwapsTwoTensors, SendsTheOldWeights]


class Pusher:
    """A policy on all ranks, with what pushes it and what looks at it afterwards."""

    def __init__(
        self, model: str, url: str, layout: dict[str, int], dtype: str, stop: StopRequest | None = None
    ):
        self.parallel = initialize(
            ParallelSettings.model_validate(layout), device=torch.device("cpu"), seed=0
        )
        self.shape = read_model_shape(Path(model))
        self.dtype = getattr(torch, dtype)
        self.chunks = build_model(self.shape, self.dtype, self.parallel)
        load_hf_weights(self.chunks, Path(model), self.shape, self.parallel)
        head = Head(self.shape, self.parallel, temperature=1.0, chunk_tokens=64)
        packer = Packer(self.parallel, micro_batch_tokens=512, share_prefixes=True)
        self.scorer = Scorer(self.chunks, head, packer, self.parallel)
        self.clients = [Client(url)] if self.parallel.is_main else []
        self.calls = Calls(stop or StopRequest())
        self.log: list[str] = []

    def sync(
        self,
        kind: type[WeightSync] = WeightSync,
        run: str = "a",
        timeout_s: float = 60.0,
        rests: bool = False,
    ) -> WeightSync:
        mark = WeightMark(run)
        return kind(
            self.chunks,
            self.shape,
            self.parallel,
            self.clients,
            dtype=self.dtype,
            server_tp=1,
            bucket_bytes=BUCKET_BYTES,
            timeout_s=timeout_s,
            mark=mark,
            calls=self.calls,
            log=self.log.append,
            release=MemoryRelease(mark) if rests else None,
        )

    def canary(self) -> Canary:
        noise, pairs = FLOAT32, [(CANARY[:1], CANARY[1:])]
        if self.dtype != torch.float32:
            wide = in_float32(self.scorer, self.shape)
            noise = Noise.between(
                *self.scorer.response_logprobs(pairs), *wide.response_logprobs(pairs)
            ).at_least(FLOAT32)
        return Canary(CANARY, self.scorer, self.calls, self.clients, noise, 4.0, self.log.append)

    def say(self, kind: type[WeightSync], canary: Canary, version: int) -> str:
        """Changes the weights and pushes them; "" where all is well, else what is wrong."""
        sync = self.sync(kind)
        perturb(self.chunks[0], version)
        try:
            sync.push(version)
            self.parallel.everywhere(lambda: canary.check(version, strict=True))
            said = ""
        except RunFailed as error:
            said = str(error)
        groups = [sync._group_name(stage) for stage in range(self.parallel.pp)]
        sync.leave()
        for client in self.clients:
            for group in groups:
                with pytest.raises(ServerRefused, match="does not exist"):
                    client.destroy_update_group(group)
        return said


def push_right_and_wrong(model: str, url: str, layout: dict[str, int], dtype: str) -> list[str]:
    """What is said after each push, first by the servers' hashes, then by the canary alone."""
    pusher = Pusher(model, url, layout, dtype)
    canary = pusher.canary()
    kinds = [kind for wrong in WRONG for kind in (WeightSync, wrong)] + [WeightSync]
    said = [pusher.say(kind, canary, version) for version, kind in enumerate(kinds)]
    for client in pusher.clients:
        fault(client.url, "/weights_checker", "missing")
    said += [pusher.say(kind, canary, 10 + version) for version, kind in enumerate(kinds)]
    for client in pusher.clients:
        fault(client.url, "/weights_checker", "none")
    if pusher.parallel.is_main:
        assert sum("of another version" in line for line in pusher.log) == len(kinds)
    if dtype == "bfloat16":
        said.append(pusher.say(SendsAnotherType, canary, 20))
    return said


def push_to_another_rope(model: str, url: str) -> list[str]:
    """The server at `url` reads another config.json."""
    pusher = Pusher(model, url, {}, "bfloat16")
    return [pusher.say(WeightSync, pusher.canary(), 0)]


def push_ten_times(model: str, url: str) -> list[str]:
    pusher = Pusher(model, url, {}, "bfloat16")
    canary = pusher.canary()
    return [pusher.say(WeightSync, canary, version) for version in range(10)]


def push_from_two_runs(model: str, url: str) -> list[str]:
    """What each of three pushes says: by one run, by another, by the first again."""
    pusher = Pusher(model, url, {}, "float32")
    ours, theirs = pusher.sync(run="a"), pusher.sync(run="b")
    said = []
    for version, sync in enumerate((ours, ours, theirs, ours)):
        try:
            assert sync.push(version)
            said.append("")
        except UserError as error:
            said.append(str(error))
    for sync in (ours, theirs):
        sync.leave()
    return said


def rest_and_push(model: str, url: str, layout: dict[str, int]) -> list[str]:
    """Which calls a server gets in a step in which it rests, beside those that carry weights; it has just answered."""
    pusher = Pusher(model, url, layout, "bfloat16")
    canary, sync = pusher.canary(), pusher.sync(run="a", rests=True)
    seen = len(calls_of(url))
    for version in range(3):
        pusher.parallel.everywhere(lambda version=version: sync.push(version))
        # the last thing before a rest is an answer
        pusher.parallel.everywhere(lambda version=version: canary.check(version, strict=True))
        seen = len(calls_of(url)) if version == 1 else seen
        if version < 2:
            sync.release_servers()
            perturb(pusher.chunks[0], version)
    made = calls_of(url)[seen:]
    sync.leave()
    return [call for call in made if "weights_update_group" not in call]


def calls_of(url: str) -> list[str]:
    return httpx.get(f"{url}/_test/calls").json()


def digests(model: str, url: str, layout: dict[str, int]) -> list[str]:
    """What the digest of the servers' weights is: before a push, after one of these weights, of others, and of these by
    another run; while one is given up; and whether it is the same on all ranks."""
    stop = StopRequest()
    pusher = Pusher(model, url, layout, "bfloat16", stop)
    sync = pusher.sync(run="a")
    found = [sync.digest]
    sync.push(1)
    found.append(sync.digest)
    kept = [parameter.detach().clone() for parameter in pusher.chunks[0].parameters()]
    perturb(pusher.chunks[0], 1)
    sync.push(2)
    found.append(sync.digest)
    for parameter, before in zip(pusher.chunks[0].parameters(), kept, strict=True):
        parameter.data.copy_(before)
    sync.leave()
    again = pusher.sync(run="b")
    again.push(7)
    found.append(again.digest)
    stop.signal = 15
    with pytest.raises(Stopped):
        again.push(8)
    found.append(again.digest)
    assert pusher.parallel.gather(found) == [found] * len(pusher.parallel.gather(0))
    again.leave()
    return found


def fault(url: str, path: str, kind: str) -> None:
    httpx.post(f"{url}/_test/fault", json={"path": path, "kind": kind}).raise_for_status()


@torch.no_grad()
def perturb(model: torch.nn.Module, version: int) -> None:
    """By a few per cent, up and down in turn, so that rounding stays what it was; the copies of a tied embedding
    alike."""
    for parameter in model.parameters():
        factor = 1.0 + 0.05 * torch.rand((), generator=torch.Generator().manual_seed(parameter.numel()))
        parameter.mul_(factor if version % 2 else 1 / factor)
