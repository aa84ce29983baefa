"""What ranks run: Hugging Face weights into megatron shards and out again."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdpo_megatron.algorithm.batching import View, microbatch
from sdpo_megatron.config import ParallelSettings
from sdpo_megatron.errors import UserError
from sdpo_megatron.models.shape import read_model_shape
from sdpo_megatron.trainer.export import export_hf
from sdpo_megatron.trainer.forward import run_microbatches
from sdpo_megatron.trainer.hf_weights import hf_layout, load_hf_weights, stream_hf_weights
from sdpo_megatron.trainer.model import build_model
from sdpo_megatron.trainer.parallel import ParallelState, initialize


def round_trips(directories: list[str], layout: dict[str, Any]) -> list[list[str]]:
    """Of each model the names that this stage streams, each bit-equal to the file's."""
    parallel = initialize(ParallelSettings(**layout), device=torch.device("cpu"), seed=1)
    return [round_trip(directory, parallel) for directory in directories]


def round_trip(directory: str, parallel: ParallelState) -> list[str]:
    shape = read_model_shape(Path(directory))
    chunks = build_model(shape, torch.float32, parallel)
    load_hf_weights(chunks, Path(directory), shape, parallel)
    stored = load_file(Path(directory) / "model.safetensors")
    sizes = []
    for name, tensor in stream_hf_weights(chunks, shape, parallel):
        assert torch.equal(tensor, stored[name]), name
        sizes.append((name, list(tensor.shape)))
    assert sizes == hf_layout(chunks, shape)
    return [name for name, _ in sizes]


def load(directory: str, layout: dict[str, Any], dtype: str, key: str) -> str:
    """What loading raises on this rank."""
    parallel = initialize(ParallelSettings(**layout), device=torch.device("cpu"), seed=1)
    shape = read_model_shape(Path(directory))
    chunks = build_model(shape, getattr(torch, dtype), parallel)
    try:
        load_hf_weights(chunks, Path(directory), shape, parallel, key)
    except UserError as error:
        return str(error)
    return ""


def export(directory: str, out: str, layout: dict[str, Any], shard_bytes: int) -> None:
    parallel = initialize(ParallelSettings(**layout), device=torch.device("cpu"), seed=1)
    shape = read_model_shape(Path(directory))
    chunks = build_model(shape, torch.float32, parallel)
    load_hf_weights(chunks, Path(directory), shape, parallel)
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.mul_(2.0)
    export_hf(Path(out), chunks, shape, Path(directory), parallel, steps=7, shard_bytes=shard_bytes)


def logits(directory: str, ids: list[int], out: str, layout: dict[str, Any]) -> None:
    """Writes the logits [S, V] at every position of one sequence to `out`."""
    got_on: list[int] = []
    settings = ParallelSettings(**layout)
    parallel = initialize(settings, device=torch.device("cpu"), seed=1, on_progress=lambda: got_on.append(1))
    write_logits(directory, ids, Path(out), parallel, torch.float32)
    # what watches for hangs hears of each micro-batch
    assert got_on == [1]
    parallel.barrier()


def write_logits(
    directory: str, ids: list[int], out: Path, parallel: ParallelState, dtype: torch.dtype
) -> None:
    """Writes the logits [S, V] at every position of one sequence to `out`, on one rank of those of the last stage."""
    shape = read_model_shape(Path(directory))
    chunks = build_model(shape, dtype, parallel)
    load_hf_weights(chunks, Path(directory), shape, parallel)
    batch = microbatch([View(0, ids[:1], [*ids[1:], 0])])  # position t predicts token t + 1; the last one any

    def at_loss(batch: Any, hidden_UD: Tensor, head_VD: Tensor) -> tuple[Tensor, dict[str, Any]]:
        shards = [torch.empty_like(head_VD) for _ in range(parallel.tp)]
        dist.all_gather(shards, head_VD.contiguous(), group=parallel.groups.tp)
        # Float16Module hands out float32
        found = hidden_UD.to(dtype) @ torch.cat(shards)[: shape.vocab].T
        return hidden_UD.new_zeros(()), {"logits": found}

    for result in run_microbatches(chunks, [batch], at_loss, parallel, learn=False):
        if parallel.tp_rank == 0:
            save_file({"logits": result["logits"].contiguous()}, out)
