"""Hugging Face weights <-> this rank's megatron shards, both ways from one table.

The table says, for each Megatron parameter of a layer, which Hugging Face tensors it is made of and how it is cut
over tensor-parallel ranks. Llama, Qwen2 and Qwen3 share it: biases and query/key norms are rows that only some have.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from sdpo_megatron.models.shape import ModelShape
from sdpo_megatron.models.weight_files import EMBEDDING, HEAD, weight_files
from sdpo_megatron.trainer.model import HiddenStatesModel, padded_vocab_size
from sdpo_megatron.trainer.parallel import ParallelState


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter: its Hugging Face parts, how they join, and how the joined tensor is cut."""

    hf: tuple[str, ...]
    join: Callable[[list[Tensor], ModelShape], Tensor]
    split: Callable[[Tensor, ModelShape], list[Tensor]]
    cut: int | None
    """Dimension that is divided over tensor-parallel ranks; None: every rank holds all of it."""
    gated: bool = False
    """Two halves (gate, up), each of them divided, so that a rank's shard is again (gate, up)."""


def _only(parts: list[Tensor], shape: ModelShape) -> Tensor:
    return parts[0]


def _alone(joined: Tensor, shape: ModelShape) -> list[Tensor]:
    return [joined]


def _join_qkv(parts: list[Tensor], shape: ModelShape) -> Tensor:
    """Megatron keeps, for each key-value group, its queries, then its key, then its value."""
    query, key, value = (part.reshape(shape.kv_heads, -1, *part.shape[1:]) for part in parts)
    return torch.cat([query, key, value], dim=1).reshape(-1, *parts[0].shape[1:])


def _split_qkv(joined: Tensor, shape: ModelShape) -> list[Tensor]:
    per_group = joined.reshape(shape.kv_heads, -1, *joined.shape[1:])
    queries = shape.heads // shape.kv_heads * shape.head_dim
    parts = per_group.split([queries, shape.head_dim, shape.head_dim], dim=1)
    return [part.reshape(-1, *joined.shape[1:]) for part in parts]


def _join_gated(parts: list[Tensor], shape: ModelShape) -> Tensor:
    return torch.cat(parts)


def _split_gated(joined: Tensor, shape: ModelShape) -> list[Tensor]:
    return list(joined.chunk(2))


def _whole(hf: str, cut: int | None = None) -> Entry:
    return Entry((hf,), _only, _alone, cut)


def layer_table(shape: ModelShape, layer: int, fused_norms: bool) -> dict[str, Entry]:
    """Megatron name within the layer -> Entry. `fused_norms`: Transformer Engine keeps them inside the linears."""
    at = f"model.layers.{layer}."
    qkv = tuple(f"{at}self_attn.{name}_proj" for name in "qkv")
    input_norm = "self_attention.linear_qkv.layer_norm_weight" if fused_norms else "input_layernorm.weight"
    mlp_norm = "mlp.linear_fc1.layer_norm_weight" if fused_norms else "pre_mlp_layernorm.weight"
    table = {
        input_norm: _whole(f"{at}input_layernorm.weight"),
        "self_attention.linear_qkv.weight": Entry(
            tuple(f"{n}.weight" for n in qkv), _join_qkv, _split_qkv, 0
        ),
        "self_attention.linear_proj.weight": _whole(f"{at}self_attn.o_proj.weight", cut=1),
        mlp_norm: _whole(f"{at}post_attention_layernorm.weight"),
        "mlp.linear_fc1.weight": Entry(
            (f"{at}mlp.gate_proj.weight", f"{at}mlp.up_proj.weight"), _join_gated, _split_gated, 0, gated=True
        ),
        "mlp.linear_fc2.weight": _whole(f"{at}mlp.down_proj.weight", cut=1),
    }
    if shape.qkv_bias:
        table["self_attention.linear_qkv.bias"] = Entry(
            tuple(f"{n}.bias" for n in qkv), _join_qkv, _split_qkv, 0
        )
    if shape.qk_norm:
        table["self_attention.q_layernorm.weight"] = _whole(f"{at}self_attn.q_norm.weight")
        table["self_attention.k_layernorm.weight"] = _whole(f"{at}self_attn.k_norm.weight")
    return table


def _entries(model: HiddenStatesModel, shape: ModelShape) -> Iterator[tuple[Tensor, Entry]]:
    """This chunk's parameters with their entries, in the order of the network."""
    parameters = dict(model.named_parameters())
    if model.pre_process:
        yield parameters.pop("embedding.word_embeddings.weight"), _whole(EMBEDDING, cut=0)
    fused = any("layer_norm_weight" in name for name in parameters)
    layers: Any = model.decoder.layers
    for index, layer in enumerate(layers):
        for name, entry in layer_table(shape, layer.layer_number - 1, fused).items():
            yield parameters.pop(f"decoder.layers.{index}.{name}"), entry
    if model.post_process:
        yield parameters.pop("decoder.final_layernorm.weight"), _whole("model.norm.weight")
        head = parameters.pop("output_layer.weight", None)
        if head is not None:
            tied = shape.tie_embeddings
            yield head, _whole(EMBEDDING if tied else HEAD, cut=0)
    if parameters:
        raise RuntimeError(f"No Hugging Face name for {sorted(parameters)} of a {shape.architecture}.")


def _shard(full: Tensor, entry: Entry, parallel: ParallelState) -> Tensor:
    if entry.cut is None:
        return full
    if entry.gated:
        return torch.cat([half.chunk(parallel.tp, 0)[parallel.tp_rank] for half in full.chunk(2)])
    return full.chunk(parallel.tp, entry.cut)[parallel.tp_rank]


def load_hf_weights(
    model: HiddenStatesModel, directory: Path, shape: ModelShape, parallel: ParallelState
) -> None:
    """Fills this rank's shards from the directory's safetensors files, which `check_weights` has found whole."""
    files: dict[str, Path] = {}
    for path in weight_files(directory):
        with safe_open(path, framework="pt") as file:
            files.update(dict.fromkeys(file.keys(), path))

    def read(name: str) -> Tensor:
        with safe_open(files[name], framework="pt") as file:
            return file.get_tensor(name)

    with torch.no_grad():
        for parameter, entry in _entries(model, shape):
            full = entry.join([read(name) for name in entry.hf], shape)
            if entry.cut == 0 and entry.hf[0] in (EMBEDDING, HEAD):
                full = _pad_rows(full, padded_vocab_size(shape.vocab, parallel.tp))
            shard = _shard(full, entry, parallel)
            if shard.shape != parameter.shape:  # copy_ would broadcast
                raise RuntimeError(f"{' + '.join(entry.hf)}: {shard.shape}, not {parameter.shape}.")
            parameter.copy_(shard)


def _pad_rows(full: Tensor, rows: int) -> Tensor:
    return torch.cat([full, full.new_zeros(rows - full.shape[0], *full.shape[1:])])


def stream_hf_weights(
    model: HiddenStatesModel, shape: ModelShape, parallel: ParallelState
) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, full tensor) of this pipeline stage, one Megatron parameter at a time, in a fixed order.

    All tensor-parallel ranks must iterate: each parameter is gathered as it is reached. A tied head is the
    embedding, so the last stage leaves it to the first.
    """
    for parameter, entry in _streamed(model, shape):
        yield from _to_hf(_gather(parameter.detach(), entry, parallel), entry, shape)


def hf_layout(
    model: HiddenStatesModel, shape: ModelShape, parallel: ParallelState
) -> list[tuple[str, list[int]]]:
    """Names and shapes that `stream_hf_weights` will yield, without moving any data."""
    layout = []
    for parameter, entry in _streamed(model, shape):
        sizes = list(parameter.shape)
        if entry.cut is not None:
            sizes[entry.cut] *= parallel.tp
        full = torch.empty(sizes, device="meta")
        layout += [(name, list(part.shape)) for name, part in _to_hf(full, entry, shape)]
    return layout


def _streamed(model: HiddenStatesModel, shape: ModelShape) -> Iterator[tuple[Tensor, Entry]]:
    for parameter, entry in _entries(model, shape):
        tied_copy = shape.tie_embeddings and entry.hf == (EMBEDDING,) and not model.pre_process
        if not tied_copy:
            yield parameter, entry


def _to_hf(full: Tensor, entry: Entry, shape: ModelShape) -> Iterator[tuple[str, Tensor]]:
    for name, part in zip(entry.hf, entry.split(full, shape), strict=True):
        yield name, part[: shape.vocab] if name in (EMBEDDING, HEAD) else part


def _gather(shard: Tensor, entry: Entry, parallel: ParallelState) -> Tensor:
    if entry.cut is None or parallel.tp == 1:
        return shard
    shards = [torch.empty_like(shard) for _ in range(parallel.tp)]
    dist.all_gather(shards, shard.contiguous(), group=parallel.groups.tp)
    if entry.gated:
        halves = [s.chunk(2) for s in shards]
        return torch.cat([half[0] for half in halves] + [half[1] for half in halves])
    return torch.cat(shards, dim=entry.cut)
