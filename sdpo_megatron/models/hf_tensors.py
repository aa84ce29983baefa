"""The tensors of a Hugging Face directory, one at a time."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdpo_megatron.errors import ConfigError
from sdpo_megatron.models.shape import ModelShape
from sdpo_megatron.models.weight_files import described, may_be_left, supported_headers, weight_files

BY_KIND = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The types of weights by safetensors' names."""


class HfTensors:
    """What is in a directory, and where."""

    def __init__(self, directory: Path, key: str = "the model") -> None:
        """`key` is what messages call the directory. Raises ConfigError where a file is missing or damaged."""
        self.directory = directory
        self.files: dict[str, Path] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for path in weight_files(directory, key):
            for name, (kind, _) in supported_headers(path).items():
                self.files[name], self.dtypes[name] = path, BY_KIND[kind]

    def bytes_of(self, shape: ModelShape) -> int:
        """Returns the size of the tensors of a model of `shape`, which are here."""
        return sum(math.prod(size) * self.dtypes[name].itemsize for name, size in described(shape))

    def read(self, name: str, begin: int = 0, rows: int | None = None) -> Tensor:
        """Returns a tensor, or so many of its `rows` from `begin` on. Raises ConfigError where its file is damaged."""
        try:
            # opened anew, as it stays mapped into memory while it is open
            with safe_open(self.files[name], framework="pt") as file:
                if rows is None:
                    return file.get_tensor(name)
                return file.get_slice(name)[begin : begin + rows]
        except SafetensorError as error:
            raise ConfigError(
                f"{self.files[name]} is damaged or cut short ({error}); download it again."
            ) from None


def hf_tensors(directory: Path, shape: ModelShape | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yields name and tensor in the order of their names; with `shape` in the order of the network, what does not
    belong to such a model last, and without what it has no use for. One tensor is in memory at a time.

    Raises ConfigError where a file is missing or damaged."""
    tensors = HfTensors(directory)
    names = sorted(tensors.files)
    if shape is not None:
        order = [name for name, _ in described(shape) if name in tensors.files]
        known = set(order)
        names = order + [name for name in names if name not in known and not may_be_left(name, shape)]
    for name in names:
        yield name, tensors.read(name)
