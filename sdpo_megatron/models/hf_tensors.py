"""The tensors of a Hugging Face directory, one after another."""

from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdpo_megatron.errors import ConfigError
from sdpo_megatron.models.shape import ModelShape
from sdpo_megatron.models.weight_files import described, may_be_left, tensor_sizes, weight_files


def hf_tensors(directory: Path, shape: ModelShape | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yields name and tensor in the order of their names; with `shape` in the order of the network, what does not
    belong to such a model last, and without what it has no use for. One tensor is in memory at a time.

    Raises ConfigError where a file is missing or damaged."""
    files = {name: path for path in weight_files(directory, "the model") for name in tensor_sizes(path)}
    names = sorted(files)
    if shape is not None:
        order = [name for name, _ in described(shape) if name in files]
        known = set(order)
        names = order + [name for name in names if name not in known and not may_be_left(name, shape)]
    for name in names:
        try:
            # opened anew, as it stays mapped into memory while it is open
            with safe_open(files[name], framework="pt") as file:
                tensor = file.get_tensor(name)
        except SafetensorError as error:
            raise ConfigError(
                f"{files[name]} is damaged or cut short ({error}); download it again."
            ) from None
        yield name, tensor
