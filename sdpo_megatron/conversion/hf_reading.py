"""Reading a Hugging Face directory, one tensor at a time."""

import math
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from sdpo_megatron.conversion.safetensors_writing import KINDS
from sdpo_megatron.errors import ConfigError
from sdpo_megatron.models.families.base import Parameter
from sdpo_megatron.models.shape import ModelShape
from sdpo_megatron.models.weight_files import described, weight_files

BY_KIND = {kind: dtype for dtype, kind in KINDS.items()}


class HfReader:
    """The tensors of one directory, which `check_weights` has found whole."""

    def __init__(self, directory: Path, shape: ModelShape, key: str) -> None:
        """`key` is what messages call the directory."""
        self.directory = directory
        self._files: dict[str, Path] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for path in weight_files(directory, key):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    self._files[name] = path
                    self.dtypes[name] = BY_KIND[file.get_slice(name).get_dtype()]
        sizes = dict(described(shape))
        self.left_out = sorted(self.dtypes.keys() - sizes.keys())
        """What is stored here although it follows from the rest: a tied head, say."""
        self.bytes = sum(math.prod(size) * self.dtypes[name].itemsize for name, size in sizes.items())

    def dtype_of(self, parameter: Parameter) -> torch.dtype:
        """Returns the type of the tensors that `parameter` is made of. Raises ConfigError where they have several."""
        kinds = {self.dtypes[name] for name in parameter.parts}
        if len(kinds) > 1:
            raise ConfigError(
                f"{self.directory} has {' and '.join(parameter.parts)}, which become one tensor, in different types; "
                "say by --dtype in which all are to be."
            )
        (kind,) = kinds
        return kind

    def read(self, name: str, begin: int = 0, rows: int | None = None) -> Tensor:
        """Returns a tensor, or so many of its `rows` from `begin` on."""
        with safe_open(self._files[name], framework="pt") as file:
            if rows is None:
                return file.get_tensor(name)
            return file.get_slice(name)[begin : begin + rows]
