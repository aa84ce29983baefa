"""Directories in the user's cache that hold a model in Hugging Face's format, converted once from another one."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import platformdirs
from safetensors import SafetensorError

from sdpo_megatron.errors import UserError
from sdpo_megatron.files import sync_directory


def models_cache() -> Path:
    return platformdirs.user_cache_path("sdpo_megatron") / "models"


def convert_once(directory: Path, convert: Callable[[Path], None]) -> None:
    """Has `convert` fill a new directory, and makes it `directory` when it is whole. It is safe when several processes
    convert at once: the first that is done is taken. Raises UserError where it cannot be written."""
    try:
        _convert(directory, convert)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"The model cannot be converted into {directory.parent} ({reason}); free space there, or give another "
            "cache directory as XDG_CACHE_HOME."
        ) from None


def _convert(directory: Path, convert: Callable[[Path], None]) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        convert(temporary)
        _publish(temporary, directory)
    finally:
        # gone already when published
        shutil.rmtree(temporary, ignore_errors=True)


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
