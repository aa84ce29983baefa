"""Writing torch_dist directories, one tensor at a time, as megatron-core's ranks write them together."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from sdpo_megatron.conversion.placement import Place
from sdpo_megatron.trainer.dist_reading import FORMAT_FILE

COMMON = "common.pt"
FORMAT = {
    **{"sharded_backend": "torch_dist", "sharded_backend_version": 1},
    **{"common_backend": "torch", "common_backend_version": 1},
}
"""What megatron-core 0.16 says of the format."""


class DistWriter:
    """Fills one directory. Nothing waits for the disk."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._described: dict[str, Any] = {}
        self._written: list[WriteResult] = []

    def add(self, file: str, place: Place, part: Tensor, dimension: int, begin: int) -> None:
        """Writes a `part` that begins at `begin` of the `dimension` of the place's own tensor."""
        own = [0] * part.dim()
        own[dimension] = begin
        ones = (1,) * len(place.before)
        chunk = ChunkStorageMetadata(
            offsets=torch.Size((*place.before, *own)), sizes=torch.Size((*ones, *part.shape))
        )
        described = self._described.setdefault(
            place.key,
            TensorStorageMetadata(
                properties=TensorProperties(dtype=part.dtype), size=torch.Size(place.whole), chunks=[]
            ),
        )
        index = MetadataIndex(place.key, chunk.offsets, len(described.chunks))
        described.chunks.append(chunk)
        alone = part.reshape(chunk.sizes).contiguous()
        # torch.save writes all of the memory that a view is of
        if alone.untyped_storage().nbytes() != alone.nbytes:
            alone = alone.clone()
        self._append(file, index, lambda stream: torch.save(alone, stream))

    def add_nothing(self, file: str, name: str) -> None:
        """megatron-core asks for the state of each of a layer's modules, which here is none."""
        content = io.BytesIO()
        torch.save([None], content)
        self._described[name] = BytesStorageMetadata()
        self._append(file, MetadataIndex(name), lambda stream: stream.write(content.getbuffer()))

    def _append(self, file: str, index: MetadataIndex, write: Callable[[BinaryIO], Any]) -> None:
        with (self._directory / file).open("ab") as stream:
            begin = stream.tell()
            write(stream)
            length = stream.tell() - begin
        info = _StorageInfo(file, begin, length)
        self._written.append(WriteResult(index=index, size_in_bytes=length, storage_data=info))

    def finish(self) -> None:
        """Writes what says that there is a checkpoint."""
        torch.save({}, self._directory / COMMON)
        FileSystemWriter(self._directory).finish(Metadata(self._described), [self._written])
        (self._directory / FORMAT_FILE).write_text(json.dumps(FORMAT), encoding="utf-8")
