"""Hugging Face weights <-> this rank's megatron shards, both ways by the table of the model's family.

`models/families` says, for each megatron parameter, which Hugging Face tensors it is made of and by which rule; here is
what each rule does with tensors.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sdpo_megatron.errors import UserError
from sdpo_megatron.models.families.base import Parameter, Rule
from sdpo_megatron.models.hf_tensors import HfTensors
from sdpo_megatron.models.shape import ModelShape
from sdpo_megatron.trainer.model import HiddenStatesModel, padded_vocab_size, unwrap
from sdpo_megatron.trainer.parallel import ParallelState


def load_hf_weights(
    chunks: Sequence[nn.Module],
    directory: Path,
    shape: ModelShape,
    parallel: ParallelState,
    key: str = "model.path",
) -> None:
    """Fills this rank's shards from the directory's safetensors files, which `check_weights` has found whole.

    `chunks` are the rank's parts of the model, as `build_model` makes them, wrapped or not; `key` is the setting that
    named the directory. Raises UserError, on all ranks, where one reads a number that is not finite in the model's
    type."""
    tensors = HfTensors(directory, key)

    def read(name: str, dtype: torch.dtype) -> Tensor:
        tensor = tensors.read(name).to(dtype)
        least, largest = (float(number) for number in torch.aminmax(tensor))
        if not (math.isfinite(least) and math.isfinite(largest)):
            count = int((~torch.isfinite(tensor)).sum())
            raise UserError(
                f"{key}: {name} in {tensors.files[name]} holds {count} numbers of {tensor.numel()} that are NaN or "
                f"infinite in {str(dtype).removeprefix('torch.')}: nothing can be computed with it; download the model "
                "again, or take another."
            )
        return tensor

    @torch.no_grad()
    def load() -> None:
        for weight, parameter in placed(chunks, shape):
            arrangement = ARRANGEMENTS[parameter.rule]
            parts = [read(name, weight.dtype) for name in parameter.parts]
            shard = _shard(arrangement.join(parts, shape, parallel.tp), arrangement, parallel)
            # copy_ would broadcast
            if shard.shape != weight.shape:
                raise RuntimeError(f"{' + '.join(parameter.parts)}: {shard.shape}, not {weight.shape}.")
            weight.copy_(shard)

    parallel.everywhere(load)


def stream_hf_weights(
    chunks: Sequence[nn.Module], shape: ModelShape, parallel: ParallelState
) -> Iterator[tuple[str, Tensor]]:
    """Yields (Hugging Face name, full tensor) of this pipeline stage, one megatron parameter at a time, in a fixed
    order.

    All tensor-parallel ranks must iterate: each parameter is gathered as it is reached. A tied head is the
    embedding, so the last stage leaves it to the first.
    """
    for weight, parameter in _streamed(chunks, shape):
        arrangement = ARRANGEMENTS[parameter.rule]
        full = _gather(weight.detach(), arrangement, parallel)
        yield from zip(parameter.parts, arrangement.split(full, shape), strict=True)


def hf_layout(chunks: Sequence[nn.Module], shape: ModelShape) -> list[tuple[str, list[int]]]:
    """Returns the names and shapes that `stream_hf_weights` will yield, without moving any data."""
    streamed = [shape.sizes_of(parameter) for _, parameter in _streamed(chunks, shape)]
    return [named for sizes in streamed for named in sizes.items()]


def _streamed(chunks: Sequence[nn.Module], shape: ModelShape) -> Iterator[tuple[Tensor, Parameter]]:
    for weight, parameter in placed(chunks, shape):
        is_tied_copy = parameter.megatron == shape.family.head.megatron and shape.tie_embeddings
        if not is_tied_copy:
            yield weight, parameter


def placed(chunks: Sequence[nn.Module], shape: ModelShape) -> Iterator[tuple[Tensor, Parameter]]:
    """This rank's weights, each with its row of the family's table, in the order of the network."""
    for chunk in chunks:
        yield from _placed_in(unwrap(chunk), shape)


def _placed_in(model: HiddenStatesModel, shape: ModelShape) -> Iterator[tuple[Tensor, Parameter]]:
    family, weights = shape.family, dict(model.named_parameters())
    experts = 0 if shape.experts is None else shape.experts.count

    def take(parameter: Parameter, at: str = "") -> Tensor:
        fused = f"{at}{parameter.fused}"
        return weights.pop(fused if fused in weights else f"{at}{parameter.megatron}")

    if model.pre_process:
        yield take(family.embedding), family.embedding
    layers: Any = model.decoder.layers
    for index, layer in enumerate(layers):
        # megatron counts layers from 1, Hugging Face from 0
        for parameter in family.of_layer(layer.layer_number - 1, experts):
            yield take(parameter, f"decoder.layers.{index}."), parameter
    if model.post_process:
        yield take(family.final_norm), family.final_norm
        if not shape.tie_embeddings:
            yield take(family.head), family.head
        elif family.head.megatron in weights:
            # the first stage has the embedding; this one holds a copy of it for its head
            yield take(family.head), replace(family.head, parts=family.embedding.parts)
    if weights:
        raise RuntimeError(f"No Hugging Face name for {sorted(weights)} of a {shape.architecture}.")


@dataclass(frozen=True)
class Arrangement:
    """What a Rule does with tensors."""

    cut: int | None
    """The dimension that is divided over tensor-parallel ranks; None: every rank holds all of it."""
    join: Callable[[list[Tensor], ModelShape, int], Tensor] = lambda parts, shape, tp: parts[0]
    """The Hugging Face parts, the shape and the number of tensor-parallel ranks -> the tensor that is cut."""
    split: Callable[[Tensor, ModelShape], list[Tensor]] = lambda joined, shape: [joined]
    """The way back: the joined tensor and the shape -> the Hugging Face parts."""
    pieces: int = 1
    """The tensor is cut as so many equal pieces, one by one; a rank's shard has its part of each."""


def _join_qkv(parts: list[Tensor], shape: ModelShape, tp: int) -> Tensor:
    query, key, value = (part.reshape(shape.kv_heads, -1, *part.shape[1:]) for part in parts)
    return torch.cat([query, key, value], dim=1).reshape(-1, *parts[0].shape[1:])


def _split_qkv(joined: Tensor, shape: ModelShape) -> list[Tensor]:
    per_group = joined.reshape(shape.kv_heads, -1, *joined.shape[1:])
    queries = shape.heads // shape.kv_heads * shape.head_dim
    parts = per_group.split([queries, shape.head_dim, shape.head_dim], dim=1)
    return [part.reshape(-1, *joined.shape[1:]) for part in parts]


def _join_vocabulary(parts: list[Tensor], shape: ModelShape, tp: int) -> Tensor:
    (rows,) = parts
    padding = rows.new_zeros(padded_vocab_size(shape.vocab, tp) - shape.vocab, *rows.shape[1:])
    return torch.cat([rows, padding])


ARRANGEMENTS = {
    Rule.WHOLE: Arrangement(cut=None),
    Rule.ROWS: Arrangement(cut=1),
    Rule.HEADS: Arrangement(cut=0),
    Rule.QKV: Arrangement(cut=0, join=_join_qkv, split=_split_qkv),
    Rule.GATED: Arrangement(
        cut=0,
        join=lambda parts, shape, tp: torch.cat(parts),
        split=lambda joined, shape: [*joined.chunk(2)],
        pieces=2,
    ),
    Rule.VOCABULARY: Arrangement(
        cut=0, join=_join_vocabulary, split=lambda joined, shape: [joined[: shape.vocab]]
    ),
}


def _shard(full: Tensor, arrangement: Arrangement, parallel: ParallelState) -> Tensor:
    if arrangement.cut is None:
        return full
    pieces = full.chunk(arrangement.pieces, arrangement.cut)
    own = [piece.chunk(parallel.tp, arrangement.cut)[parallel.tp_rank] for piece in pieces]
    return torch.cat(own, arrangement.cut)


def _gather(shard: Tensor, arrangement: Arrangement, parallel: ParallelState) -> Tensor:
    if arrangement.cut is None or parallel.tp == 1:
        return shard
    shards = [torch.empty_like(shard) for _ in range(parallel.tp)]
    dist.all_gather(shards, shard.contiguous(), group=parallel.groups.tp)
    pieces = [shard.chunk(arrangement.pieces, arrangement.cut) for shard in shards]
    return torch.cat([piece for same in zip(*pieces, strict=True) for piece in same], arrangement.cut)
