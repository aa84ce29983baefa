"""Weights by their headers alone: files of the right size in which nothing but the header takes space."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from sdpo_megatron.models.shape import ModelShape
from sdpo_megatron.models.weight_files import described


def write_weights(directory: Path, shape: ModelShape, dtype: str = "F32") -> None:
    """model.safetensors of a model of `shape`, all zeros."""
    write_tensors(directory / "model.safetensors", dict(described(shape)), dtype)


def write_tensors(file: Path, sizes: Mapping[str, Sequence[int]], dtype: str = "F32") -> None:
    item = {"F32": 4, "BF16": 2, "F8_E4M3": 1}[dtype]
    header, end = {}, 0
    for name, size in sizes.items():
        begin, end = end, end + item * math.prod(size)
        header[name] = {"dtype": dtype, "shape": list(size), "data_offsets": [begin, end]}
    content = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(len(content).to_bytes(8, "little") + content)
        out.truncate(8 + len(content) + end)
