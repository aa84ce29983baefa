"""Reading torch_dist directories, one tensor at a time."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.utils import _create_file_view

from sdpo_megatron.errors import RunFailed, UserError
from sdpo_megatron.models.megatron_weights import METADATA
from sdpo_megatron.trainer import safe_reading

safe_reading.install()

FORMAT_FILE = "metadata.json"
"""megatron-core's word that a directory holds a checkpoint, and in which format."""


class DistReader:
    """The tensors of one torch_dist directory. Nothing in it is run."""

    def __init__(self, directory: Path) -> None:
        """Raises UserError where `directory` holds no such checkpoint, or not all of it; RunFailed where it is
        damaged."""
        self.directory = directory
        missing = [name for name in (FORMAT_FILE, METADATA) if not (directory / name).is_file()]
        if missing:
            raise UserError(
                f"{directory} is no checkpoint that megatron-core wrote (there is no {missing[0]}); name a run, one of "
                "its checkpoints, or a directory in the format torch_dist."
            )
        try:
            self._metadata = FileSystemReader(directory).read_metadata()
        # whatever an unpickler that meets damaged bytes raises
        except Exception as error:
            raise RunFailed(
                f"{directory} cannot be read ({in_short(error)}): it is damaged, or of another version. Put it back "
                "from a copy."
            ) from error
        self._check_files()

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for place in self._metadata.storage_data.values():
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
        for name, end in sorted(ends.items()):
            file = self.directory / name
            if not file.is_file() or file.stat().st_size < end:
                what = "cut short" if file.is_file() else "missing"
                raise UserError(f"{self.directory} is not whole: {name} is {what}; copy it again.")

    def keys(self) -> dict[str, None]:
        """Returns the names of all tensors."""
        described = self._metadata.state_dict_metadata.items()
        return {key: None for key, value in described if isinstance(value, TensorStorageMetadata)}

    def sizes_of(self, key: str) -> tuple[int, ...]:
        return tuple(self._of(key).size)

    def dtype_of(self, key: str) -> torch.dtype:
        return self._of(key).properties.dtype

    def _of(self, key: str) -> TensorStorageMetadata:
        return cast(TensorStorageMetadata, self._metadata.state_dict_metadata[key])

    def row_blocks(self, key: str, axis: int, rows: int) -> Iterator[tuple[int, int]]:
        """Yields (begin, length) of blocks that cover the first `rows` along the dimension `axis` of the tensor `key`,
        so that each lies in what a rank once wrote, and nothing has to be read twice."""
        edges = {chunk.offsets[axis] for chunk in self._of(key).chunks if chunk.offsets[axis] < rows}
        yield from ((begin, end - begin) for begin, end in pairwise([*sorted(edges | {0}), rows]))

    def read(self, key: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """Returns the part of the tensor `key` that begins at `offsets` and has `sizes`, which must lie inside of it.
        Memory holds that part and one more of what a rank once wrote, or that alone where it is all of the part.

        Raises RunFailed where the directory does not give it back."""
        described = self._of(key)
        wanted = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, described, [wanted])
        held = sum(math.prod(item.lengths) for item in items)
        if held != math.prod(sizes):
            raise self._damaged(key, f"its parts hold {held} numbers of {math.prod(sizes)}")
        if len(items) == 1 and items[0].lengths == wanted.sizes:
            return self._stored(items[0], described)
        into = torch.empty(tuple(sizes), dtype=described.properties.dtype)
        for item in items:
            narrow_tensor_by_index(into, item.dest_offsets, item.lengths).copy_(self._stored(item, described))
        return into

    def _stored(self, item: ReadItem, described: TensorStorageMetadata) -> Tensor:
        sizes = described.chunks[item.storage_index.index or 0].sizes
        try:
            place = self._metadata.storage_data[item.storage_index]
            with (self.directory / place.relative_path).open("rb") as file:
                part = _create_file_view(file, place.offset, place.length)
                tensor = torch.load(part, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
        # whatever a parser that meets damaged bytes raises
        except Exception as error:
            raise self._damaged(item.storage_index.fqn, in_short(error)) from error
        if not isinstance(tensor, Tensor) or (tensor.shape, tensor.dtype) != (
            sizes,
            described.properties.dtype,
        ):
            raise self._damaged(item.storage_index.fqn, "it is not what is said of it")
        return narrow_tensor_by_index(tensor, item.storage_offsets, item.lengths)

    def _damaged(self, key: str, why: str) -> RunFailed:
        return RunFailed(
            f"{self.directory} is damaged: {key} cannot be read ({why}). Put it back from a copy."
        )


def in_short(error: BaseException) -> str:
    """Returns the error's type and first line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
