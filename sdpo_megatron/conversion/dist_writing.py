"""Writing torch_dist directories, one tensor at a time, as megatron-core's ranks write them together."""

import io
import json
import math
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, Protocol

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

from sdpo_megatron.conversion.placement import Place, Placement
from sdpo_megatron.trainer.dist_reading import FORMAT_FILE

COMMON = "common.pt"
ROWS_BYTES = 64 * 2**20
"""What is written at once of a tensor that has a row for each token, counted in float32."""
FORMAT = {
    **{"sharded_backend": "torch_dist", "sharded_backend_version": 1},
    **{"common_backend": "torch", "common_backend_version": 1},
}
"""What megatron-core 0.16 says of the format."""


class Weights(Protocol):
    """Where the numbers come from."""

    def whole(self, place: Place) -> Tensor:
        """Returns the place's tensor."""
        ...

    def rows(self, place: Place, begin: int, count: int) -> Tensor:
        """Returns these rows of a place that has one for each token, padding included."""
        ...


def write_dist(
    directory: Path, placement: Placement, layers: int, weights: Weights, *, tp: int, pp: int, rows: int
) -> None:
    """Fills `directory` with a model of `layers` layers and `rows` rows for tokens, cut as `tp` * `pp` ranks would have
    cut it, a file each. The rows are cut further, so that memory never holds all of them.

    What says that there is a checkpoint is written last."""
    writer = _Writer(directory, rows)
    for stage in range(pp):
        places = [place for place in placement.places if place.layer * pp // layers == stage]
        objects = [name for name, layer in placement.objects.items() if layer * pp // layers == stage]
        with writer.stage(stage, tp) as files:
            for name in objects:
                writer.add_nothing(name, files[0])
            for place in places:
                (_add_rows if place.is_vocabulary else _add_whole)(writer, files, place, weights, rows)
    torch.save({}, directory / COMMON)
    writer.finish()
    (directory / FORMAT_FILE).write_text(json.dumps(FORMAT), encoding="utf-8")


def _add_whole(writer: "_Writer", files: "list[_File]", place: Place, weights: Weights, rows: int) -> None:
    tensor = weights.whole(place)
    for file, parts in zip(files, place.cuts(tuple(tensor.shape), len(files)), strict=True):
        for dimension, begin, length in parts:
            writer.add(place, tensor.narrow(dimension, begin, length), dimension, begin, file)


def _add_rows(writer: "_Writer", files: "list[_File]", place: Place, weights: Weights, rows: int) -> None:
    at_once = max(ROWS_BYTES // (4 * math.prod(place.sizes[1:])), 1)
    for file, parts in zip(files, place.cuts((rows, *place.sizes[1:]), len(files)), strict=True):
        for dimension, begin, length in parts:
            for first in range(begin, begin + length, at_once):
                count = min(at_once, begin + length - first)
                writer.add(place, weights.rows(place, first, count), dimension, first, file)


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
    def __init__(self, directory: Path, rows: int) -> None:
        self._directory, self._rows = directory, rows
        self._described: dict[str, Any] = {}
        self._files: list[_File] = []

    def stage(self, stage: int, tp: int) -> "_Stage":
        names = [f"__{stage * tp + rank}_0.distcp" for rank in range(tp)]
        opened = _Stage(self._directory / name for name in names)
        self._files += opened.files
        return opened

    def add(self, place: Place, part: Tensor, dimension: int, begin: int, file: _File) -> None:
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
                properties=TensorProperties(dtype=part.dtype),
                size=torch.Size(place.whole(self._rows)),
                chunks=[],
            ),
        )
        index = MetadataIndex(place.key, chunk.offsets, len(described.chunks))
        described.chunks.append(chunk)
        alone = part.reshape(chunk.sizes).contiguous()
        # torch.save writes all of the memory that a view is of
        if alone.untyped_storage().nbytes() != alone.nbytes:
            alone = alone.clone()
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
