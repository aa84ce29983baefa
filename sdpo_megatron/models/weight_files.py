"""What a model directory's weights are, by the headers of their files, against what its config.json describes.

Nothing heavy is imported and no tensor is read: a mistake ends the command before anything starts.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from sdpo_megatron.errors import ConfigError
from sdpo_megatron.files import check_downloaded, read_text
from sdpo_megatron.models.families.base import LAYERS
from sdpo_megatron.models.shape import ModelShape

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""The types that can be converted without a scale, as safetensors names them, and the bytes of a number."""
INDEX_BYTES = 100_000_000
"""The most that an index may have: a hundred bytes for each of a million tensors."""
READ_AT_ONCE = 1 << 24
"""Bytes of a tensor that are read at a time."""


def weight_files(directory: Path, key: str = "model.path") -> list[Path]:
    """Returns the safetensors files that transformers would read; `key` is the setting that named the directory.

    Raises ConfigError where one is missing."""
    index, files = directory / INDEX, [directory / SINGLE]
    if index.is_file():
        if (directory / SINGLE).is_file() and indexed_names(index) != [SINGLE]:
            raise ConfigError(
                f"{key}: {directory} has both {SINGLE} and {INDEX} of other files, which may be other weights; remove "
                "one of them."
            )
        files = [directory / name for name in indexed_names(index)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ConfigError(
            f"{key}: {directory} has no {missing[0]}; download the model's weights as safetensors into it."
        )
    return files


def weights_sha256(directory: Path) -> str:
    """Returns a SHA-256 of the directory's weights, however they are spread over files: of a line for each tensor in
    the order of their names, with name, type, shape and the SHA-256 of its bytes.

    Reads them all. Raises ConfigError where a file is missing."""
    lines: dict[str, str] = {}
    for path in weight_files(directory):
        for name in supported_headers(path):
            kind, digest = _content(path, name)
            lines[name] = f"{name} {kind} {digest}\n"
    return hashlib.sha256("".join(line for _, line in sorted(lines.items())).encode()).hexdigest()


def indexed_names(index: Path) -> list[str]:
    """Returns the names of the files beside `index` that it distributes the tensors over. Raises ConfigError where it
    is damaged."""
    damaged = ConfigError(f"{index} is damaged: it must hold a JSON object with 'weight_map'.")
    try:
        names = sorted(set(json.loads(read_text(index, INDEX_BYTES))["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise damaged from None
    if outside:
        raise damaged
    return names


def check_weights(directory: Path, shape: ModelShape, key: str = "model.path") -> None:
    """Raises ConfigError unless every tensor of a model of `shape` is there, in its size, and no other is."""
    sizes: dict[str, list[int]] = {}
    files: dict[str, Path] = {}
    for file in weight_files(directory, key):
        headers = supported_headers(file)
        sizes |= {name: size for name, (_, size) in headers.items()}
        files |= dict.fromkeys(headers, file)
    _check_tied(files, shape, directory, key)
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
    others = [name for name in sizes if not may_be_left(name, shape)]
    if others:
        raise ConfigError(
            f"{key}: {directory} holds {others[0]}, which a {shape.architecture} with this config.json does not have: "
            "it would be left out; take both from the same model."
        )


def described(shape: ModelShape) -> Iterator[tuple[str, list[int]]]:
    """Yields Hugging Face name and size of every tensor of a model of `shape`."""
    for parameter in shape.parameters():
        yield from shape.sizes_of(parameter).items()


def supported_headers(file: Path) -> dict[str, tuple[str, list[int]]]:
    """Returns what `tensor_headers` does. Raises ConfigError also where a type is one that cannot be converted without
    a scale."""
    headers = tensor_headers(file)
    for name, (dtype, _) in headers.items():
        if dtype not in DTYPES:
            raise ConfigError(
                f"{file}: {name} is of type {dtype}, which is not supported; supported: {', '.join(DTYPES)}."
            )
    return headers


def tensor_headers(file: Path) -> dict[str, tuple[str, list[int]]]:
    """Returns name -> type, as safetensors names it, and size of the tensors of a file. Raises ConfigError where its
    header is damaged."""
    check_downloaded(file)
    try:
        with safe_open(file, framework="np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}
            return {name: (x.get_dtype(), list(x.get_shape())) for name, x in slices.items()}
    except SafetensorError as error:
        raise ConfigError(f"{file} is damaged or cut short ({error}); download it again.") from None


def _check_tied(files: Mapping[str, Path], shape: ModelShape, directory: Path, key: str) -> None:
    """Raises ConfigError where a head is stored beside the embedding that it is said to be, and is another:
    transformers computes with the head then, and SGLang with the embedding."""
    embedding, head = next(iter(shape.family.embedding.parts)), next(iter(shape.family.head.parts))
    if shape.tie_embeddings and {embedding, head} <= files.keys():
        if _content(files[embedding], embedding) != _content(files[head], head):
            cure = "write false there"
            if "tie_word_embeddings" in shape.family.only:
                cure = f"models of {shape.family.model_type} with a head of their own are not supported"
            raise ConfigError(
                f"{key}: {directory} holds a {head} that differs from {embedding}, but its config.json says "
                f"tie_word_embeddings: true, with which it would be dropped; {cure}."
            )


def _content(path: Path, name: str) -> tuple[tuple[str, list[int]], str]:
    """Returns type and shape of the tensor `name` in a safetensors file, and the SHA-256 of its bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(header))[name]
        begin, end = entry["data_offsets"]
        file.seek(8 + header + begin)
        left = end - begin
        while left and (part := file.read(min(left, READ_AT_ONCE))):
            digest.update(part)
            left -= len(part)
    return (entry["dtype"], entry["shape"]), digest.hexdigest()


def may_be_left(name: str, shape: ModelShape) -> bool:
    """Returns whether a model of `shape` has no use for that tensor: it is saved beside a tied embedding, or made from
    rope_theta again."""
    return (name in shape.family.head.parts and shape.tie_embeddings) or name.endswith(".rotary_emb.inv_freq")
