"""Writing a model as safetensors files, one tensor at a time: the library wants a whole file's tensors at once.

A file is the length of its header in eight bytes, the header in JSON, and each tensor's bytes where the header says
(https://github.com/huggingface/safetensors#format).
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdpo_megatron.models.hf_tensors import BY_KIND
from sdpo_megatron.models.weight_files import INDEX, SINGLE

SHARD_BYTES = 5 * 10**9
"""Size that a file does not exceed, unless by a single tensor: what transformers' files have."""
KINDS = {dtype: kind for kind, dtype in BY_KIND.items()}


def write_safetensors(
    directory: Path,
    announced: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes model.safetensors, or several files with an index where there is more than `shard_bytes`. `tensors` are
    those that are `announced`, where none needs numbers, in their order, each whole or in blocks of rows; each is
    written before the next is asked for. The index comes last. Nothing waits for the disk."""
    shards = _shards(announced, shard_bytes)
    names = [SINGLE]
    if len(shards) > 1:
        names = [
            f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
        ]
    stream = iter(tensors)
    for file, shard in zip(names, shards, strict=True):
        _write(directory / file, shard, stream)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in announced.values())
        files = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(announced: Mapping[str, Tensor], shard_bytes: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in announced.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _write(path: Path, shard: Mapping[str, Tensor], stream: Iterator[tuple[str, Tensor]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in shard.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": KINDS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    # so that numbers begin at multiples of eight
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for expected, tensor in shard.items():
            left = len(tensor)
            while left > 0:
                name, rows = next(stream)
                left -= len(rows)
                fits = (name, rows.dtype, rows.shape[1:]) == (expected, tensor.dtype, tensor.shape[1:])
                if left < 0 or not fits:
                    raise RuntimeError(
                        f"{name} came as {rows.dtype} {tuple(rows.shape)}, not {expected} as {tensor.dtype} "
                        f"{tuple(tensor.shape)}."
                    )
                file.write(rows.contiguous().view(-1).view(torch.uint8).numpy().data)
