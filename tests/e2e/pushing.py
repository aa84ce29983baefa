"""What ranks run: pushes to a server, right and wrong ones."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from sdpo_megatron.config import ParallelSettings
from sdpo_megatron.errors import RunFailed, ServerRefused, UserError
from sdpo_megatron.models.shape import read_model_shape
from sdpo_megatron.rollout.client import Client
from sdpo_megatron.rollout.weight_mark import WeightMark
from sdpo_megatron.serving.canary import Canary
from sdpo_megatron.serving.push import WeightSync
from sdpo_megatron.trainer.hf_weights import load_hf_weights
from sdpo_megatron.trainer.model import build_model
from sdpo_megatron.trainer.parallel import initialize
from sdpo_megatron.trainer.score import Head, Packer, Scorer

BUCKET_BYTES = 200_000
CANARY = list(range(5, 69))


class DropsABucket(WeightSync):
    def _send_bucket(self, stage, bucket, flat, mark):
        if not (stage == 0 and bucket == self.stages[0].buckets[1]):
            super()._send_bucket(stage, bucket, flat, mark)


class SwapsTwoTensors(WeightSync):
    """Key and value projection of each layer: the same shape, next to each other in a bucket."""

    def _flat_buckets(self):
        swapped = 0
        for bucket, flat in zip(self.buckets, super()._flat_buckets(), strict=True):
            parts = list(flat.split([4 * torch.Size(shape).numel() for shape in bucket["shapes"]]))
            for i, names in enumerate(pairwise(bucket["names"])):
                if [name.split(".")[-2] for name in names] == ["k_proj", "v_proj"]:
                    parts[i], parts[i + 1] = parts[i + 1], parts[i]
                    swapped += 1
            yield torch.cat(parts)
        assert swapped


def push_right_and_wrong(model: str, url: str, layout: dict[str, int]) -> list[str]:
    """What the canary says after each push, "" where it is content; the weights change before every push."""
    parallel = initialize(ParallelSettings.model_validate(layout), device=torch.device("cpu"), seed=0)
    shape = read_model_shape(Path(model))
    chunks = build_model(shape, torch.float32, parallel)
    load_hf_weights(chunks, Path(model), shape, parallel)
    head = Head(shape, parallel, temperature=1.0, chunk_tokens=64)
    packer = Packer(parallel, micro_batch_tokens=512, share_prefixes=True)
    clients = [Client(url)] if parallel.is_main else []
    canary = Canary(CANARY, Scorer(chunks, head, packer, parallel), clients, tolerance=2e-3)
    said = []
    for version, kind in enumerate((WeightSync, DropsABucket, WeightSync, SwapsTwoTensors, WeightSync)):
        sync = kind(
            chunks,
            shape,
            parallel,
            clients,
            dtype=torch.float32,
            server_tp=1,
            bucket_bytes=BUCKET_BYTES,
            timeout_s=60.0,
            mark=WeightMark("a"),
            log=lambda line: None,
        )
        perturb(chunks[0], parallel)
        sync.push(version)
        try:
            canary.check(version)
            said.append("")
        except RunFailed as error:
            said.append(str(error))
        groups = [sync._group_name(stage) for stage in range(parallel.pp)]
        sync.leave()
        for client in clients:
            for group in groups:
                with pytest.raises(ServerRefused, match="does not exist"):
                    client.destroy_update_group(group)
    return said


def push_from_two_runs(model: str, url: str) -> list[str]:
    """What each of three pushes says: by one run, by another, by the first again."""
    parallel = initialize(ParallelSettings(), device=torch.device("cpu"), seed=0)
    shape = read_model_shape(Path(model))
    chunks = build_model(shape, torch.float32, parallel)
    load_hf_weights(chunks, Path(model), shape, parallel)
    ours, theirs = [
        WeightSync(
            chunks,
            shape,
            parallel,
            [Client(url)],
            dtype=torch.float32,
            server_tp=1,
            bucket_bytes=BUCKET_BYTES,
            timeout_s=60.0,
            mark=WeightMark(run),
            log=lambda line: None,
        )
        for run in ("a", "b")
    ]
    said = []
    for version, sync in enumerate((ours, ours, theirs, ours)):
        try:
            sync.push(version)
            said.append("")
        except UserError as error:
            said.append(str(error))
    for sync in (ours, theirs):
        sync.leave()
    return said


@torch.no_grad()
def perturb(model: torch.nn.Module, parallel) -> None:
    """By a few per cent, the copies of a tied embedding alike."""
    for parameter in model.parameters():
        factor = 1.0 + 0.05 * torch.rand((), generator=torch.Generator().manual_seed(parameter.numel()))
        parameter.mul_(factor)
