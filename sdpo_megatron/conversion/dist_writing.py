"""Writing torch_dist directories, one tensor at a time, as megatron-core's ranks write them together."""

import io
import json
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
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

from sdpo_megatron.conversion.dist_reading import FORMAT_FILE
from sdpo_megatron.conversion.placement import Place, Placement

COMMON = "common.pt"
FORMAT = {
    **{"sharded_backend": "torch_dist", "sharded_backend_version": 1},
    **{"common_backend": "torch", "common_backend_version": 1},
}
"""What megatron-core 0.16 says of the format."""


def write_dist(
    directory: Path,
    placement: Placement,
    layers: int,
    read: Callable[[Place], Tensor],
    *,
    tp: int,
    pp: int,
    rows: int,
) -> None:
    """Fills `directory` with a model of `layers` layers, cut as `tp` * `pp` ranks would have cut it, a file each.

    `read` gives each place's tensor, in memory that may be used again, with `rows` rows where it has one for each
    token. What says that there is a checkpoint is written last."""
    writer = _Writer(directory)
    for stage in range(pp):
        places = [place for place in placement.places if place.layer * pp // layers == stage]
        objects = [name for name, layer in placement.objects.items() if layer * pp // layers == stage]
        with writer.stage(stage, tp) as files:
            for name in objects:
                writer.add_nothing(name, files[0])
            for place in places:
                tensor = read(place)
                for file, parts in zip(files, place.cuts(tuple(tensor.shape), tp), strict=True):
                    for dimension, begin, length in parts:
                        writer.add(
                            place, rows, tensor.narrow(dimension, begin, length), dimension, begin, file
                        )
    torch.save({}, directory / COMMON)
    writer.finish()
    (directory / FORMAT_FILE).write_text(json.dumps(FORMAT), encoding="utf-8")


class _File:
    """What one rank writes."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self.path, self.stream = path, stream
        self.written: list[WriteResult] = []

    def add(self, index: MetadataIndex, write: Callable[[BinaryIO], Any]) -> None:
        begin = self.stream.tell()
        write(self.stream)
        length = self.stream.tell() - begin
        info = _StorageInfo(self.path.name, begin, length)
        self.written.append(WriteResult(index=index, size_in_bytes=length, storage_data=info))


class _Writer:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._described: dict[str, Any] = {}
        self._files: list[_File] = []

    def stage(self, stage: int, tp: int) -> "_Stage":
        names = [f"__{stage * tp + rank}_0.distcp" for rank in range(tp)]
        opened = _Stage(self._directory / name for name in names)
        self._files += opened.files
        return opened

    def add(self, place: Place, rows: int, part: Tensor, dimension: int, begin: int, file: _File) -> None:
        """`part` begins at `begin` of the `dimension` of the place's own tensor."""
        own = [0] * part.dim()
        own[dimension] = begin
        ones = (1,) * len(place.before)
        chunk = ChunkStorageMetadata(
            offsets=torch.Size((*place.before, *own)), sizes=torch.Size((*ones, *part.shape))
        )
        described = self._described.setdefault(
            place.key,
            TensorStorageMetadata(
                properties=TensorProperties(dtype=part.dtype), size=torch.Size(place.whole(rows)), chunks=[]
            ),
        )
        index = MetadataIndex(place.key, chunk.offsets, len(described.chunks))
        described.chunks.append(chunk)
        # torch.save writes all of the memory that a view is of
        alone = part.reshape(chunk.sizes).clone(memory_format=torch.contiguous_format)
        file.add(index, lambda stream: torch.save(alone, stream))

    def add_nothing(self, name: str, file: _File) -> None:
        """megatron-core asks for the state of each of a layer's modules, which here is none."""
        content = io.BytesIO()
        torch.save([None], content)
        self._described[name] = BytesStorageMetadata()
        file.add(MetadataIndex(name), lambda stream: stream.write(content.getbuffer()))

    def finish(self) -> None:
        writer = FileSystemWriter(self._directory)
        writer.finish(Metadata(self._described), [file.written for file in self._files])


class _Stage:
    """The files of a pipeline stage's tensor-parallel ranks, open together: each tensor is read once for all."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._stack = ExitStack()
        self.files = [_File(path, self._stack.enter_context(path.open("wb"))) for path in paths]

    def __enter__(self) -> list[_File]:
        return self.files

    def __exit__(self, *exception: object) -> None:
        with self._stack:
            for file in self.files:
                file.stream.flush()
                os.fsync(file.stream.fileno())
