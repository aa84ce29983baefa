"""Weights that are torch's pickles (pytorch_model.bin, or several with an index), converted to safetensors, which
trainer and server read without running anything that a file says."""

import json
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from sdpo_megatron.errors import ConfigError
from sdpo_megatron.models.weight_files import INDEX, SINGLE, indexed_names

if TYPE_CHECKING:
    from torch import Tensor

BIN_INDEX = "pytorch_model.bin.index.json"
SETTINGS = (".json", ".jinja", ".model", ".txt")


def find_binaries(directory: Path) -> list[Path]:
    """Returns the files of weights in `directory`, of which there may be none. Raises ConfigError where one of several
    is missing."""
    index = directory / BIN_INDEX
    files = [directory / "pytorch_model.bin"]
    if not index.is_file():
        return [path for path in files if path.is_file()]
    files = [directory / name for name in indexed_names(index)]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ConfigError(f"{directory} has no {missing[0]}, which its {BIN_INDEX} names; download it again.")
    return files


def find_settings(directory: Path) -> list[Path]:
    """Returns the files beside the weights that are copied."""
    paths = sorted(directory.iterdir())
    return [path for path in paths if path.suffix in SETTINGS and path.name != BIN_INDEX and path.is_file()]


def convert_binaries(binaries: list[Path], settings: list[Path], target: Path) -> None:
    """Fills `target`. Raises ConfigError where a file is damaged, or holds anything but tensors."""
    from safetensors.torch import save_file

    weight_map: dict[str, str] = {}
    for number, path in enumerate(binaries, start=1):
        name = SINGLE if len(binaries) == 1 else f"model-{number:05d}-of-{len(binaries):05d}.safetensors"
        tensors = _alone(_read(path))
        save_file(tensors, target / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    if len(binaries) > 1:
        (target / INDEX).write_text(json.dumps({"weight_map": weight_map}, indent=2), encoding="utf-8")
    for path in settings:
        shutil.copyfile(path, target / path.name)


def _read(path: Path) -> "dict[str, Tensor]":
    import torch

    try:
        # files of torch before 1.6 are no archives, which alone can be mapped
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        # torch's own words advise to run what a pickle says
        reason = "" if isinstance(error, pickle.UnpicklingError) else f" ({_first_line(error)})"
        raise ConfigError(
            f"{path} is damaged, or holds more than tensors, which is not loaded{reason}; download the model as "
            "safetensors."
        ) from None
    if not isinstance(values, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in values.items()
    ):
        raise ConfigError(
            f"{path} is no state dict, which has tensors by name alone; download the model as safetensors."
        )
    return values


def _first_line(error: Exception) -> str:
    return "".join(str(error).strip().splitlines()[:1])[:200]


def _alone(tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """Each tensor in memory of its own, as safetensors wants it: tied ones share theirs."""
    taken: set[int] = set()
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        shared = storage.data_ptr() in taken or storage.nbytes() != tensor.numel() * tensor.element_size()
        taken.add(storage.data_ptr())
        result[name] = tensor.detach().clone() if shared else tensor.detach().contiguous()
    return result
