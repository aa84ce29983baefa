"""What a model directory's weights are, by the headers of their files, against what its config.json describes.

Nothing heavy is imported and no tensor is read: a mistake ends the command before anything starts.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from sdpo_megatron.errors import ConfigError
from sdpo_megatron.models.families.base import LAYERS
from sdpo_megatron.models.shape import ModelShape

INDEX = "model.safetensors.index.json"
DTYPES = ("F64", "F32", "F16", "BF16")
"""The types that can be converted without a scale, as safetensors names them."""


def weight_files(directory: Path, key: str = "model.path") -> list[Path]:
    """Returns the safetensors files that transformers would read; `key` is the setting that named the directory.

    Raises ConfigError where one is missing."""
    index, files = directory / INDEX, [directory / "model.safetensors"]
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            files = [directory / name for name in sorted(names)]
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ConfigError(f"{index} is damaged: it must hold a JSON object with 'weight_map'.") from None
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ConfigError(
            f"{key}: {directory} has no {missing[0]}; download the model's weights as safetensors into it."
        )
    return files


def check_weights(directory: Path, shape: ModelShape, key: str = "model.path") -> None:
    """Raises ConfigError unless every tensor of a model of `shape` is there, in its size, and no other is."""
    sizes: dict[str, list[int]] = {}
    for file in weight_files(directory, key):
        sizes |= _tensors(file)
    numbered = re.compile(rf"{re.escape(LAYERS)}\.(\d+)\.")
    layers = {int(found[1]) for name in sizes if (found := numbered.match(name))}
    if layers and max(layers) + 1 != shape.layers:
        raise ConfigError(
            f"{key}: {directory} has the weights of {max(layers) + 1} layers, but config.json says "
            f"num_hidden_layers {shape.layers}; make them equal."
        )
    for name, size in described(shape):
        if name not in sizes:
            raise ConfigError(
                f"{key}: {directory} has no tensor {name}, which a {shape.architecture} needs; download it again."
            )
        if sizes[name] != size:
            raise ConfigError(
                f"{key}: {name} in {directory} has the shape {sizes[name]}, but config.json describes {size}; take "
                "both from the same model."
            )
        del sizes[name]
    others = [name for name in sizes if not _may_be_left(name, shape)]
    if others:
        raise ConfigError(
            f"{key}: {directory} holds {others[0]}, which a {shape.architecture} with this config.json does not have: "
            "it would be left out; take both from the same model."
        )


def described(shape: ModelShape) -> Iterator[tuple[str, list[int]]]:
    """Yields Hugging Face name and size of every tensor of a model of `shape`."""
    for parameter in shape.family.parameters(shape.layers, tied=shape.tie_embeddings):
        yield from shape.sizes_of(parameter).items()


def _tensors(file: Path) -> dict[str, list[int]]:
    try:
        with safe_open(file, framework="np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}
    except SafetensorError as error:
        raise ConfigError(f"{file} is damaged or cut short ({error}); download it again.") from None
    for name, tensor in slices.items():
        if tensor.get_dtype() not in DTYPES:
            raise ConfigError(
                f"{file}: {name} is of type {tensor.get_dtype()}, which is not supported; supported: "
                f"{', '.join(DTYPES)}."
            )
    return {name: list(tensor.get_shape()) for name, tensor in slices.items()}


def _may_be_left(name: str, shape: ModelShape) -> bool:
    """Saved beside a tied embedding, or made from rope_theta again."""
    return (name in shape.family.head.parts and shape.tie_embeddings) or name.endswith(".rotary_emb.inv_freq")
