"""How a checkpoint describes itself: the model's shape, by the manifest, and where its tensors lie, by torch."""

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch.distributed.checkpoint.filesystem import FileSystemReader

from sdpo_megatron.errors import RunFailed, UserError
from sdpo_megatron.models.shape import ModelShape
from sdpo_megatron.trainer import safe_reading


def read_metadata(checkpoint: Path) -> Any:
    """Returns torch's description of a checkpoint's tensors. Raises RunFailed where it is damaged or forged."""
    safe_reading.install()
    try:
        return FileSystemReader(checkpoint).read_metadata()
    # whatever a parser that meets damaged bytes raises
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise RunFailed(
            f"{checkpoint}/.metadata cannot be read ({type(error).__name__}: {reason}). Put it back from a copy."
        ) from error


def stored_shape(checkpoint: Path, manifest: dict[str, Any]) -> ModelShape:
    """Returns the shape of the model whose weights a checkpoint holds. Raises UserError where this version knows no
    such model."""
    try:
        shape = TypeAdapter(ModelShape).validate_python(manifest["model"])
        assert shape.family
        return shape
    except (ValidationError, KeyError):
        raise UserError(
            f"{checkpoint} holds a model that this version does not describe in that way "
            f"({manifest['model'].get('architecture')}): read it with the version that saved it."
        ) from None
