"""Reading torch_dist directories, one tensor at a time."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from sdpo_megatron.errors import RunFailed, UserError
from sdpo_megatron.trainer import safe_reading

safe_reading.install()

FORMAT_FILE = "metadata.json"
"""megatron-core's word that a directory holds a checkpoint, and in which format."""
METADATA = ".metadata"
"""torch's word which tensors there are, and where."""


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
        self._reader = FileSystemReader(directory)
        try:
            self._metadata = self._reader.read_metadata()
        # whatever an unpickler that meets damaged bytes raises
        except Exception as error:
            raise self._unreadable(error) from error
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
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

    def read(self, key: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """Returns the part of the tensor `key` that begins at `offsets` and has `sizes`, which must lie inside of it.
        Memory holds that part and one more of what a rank once wrote.

        Raises RunFailed where the directory does not give it back."""
        wanted = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, self._of(key), [wanted])
        if sum(math.prod(item.lengths) for item in items) != math.prod(sizes):
            raise RunFailed(
                f"{self.directory} does not hold every part of {key} once: copy it again, or take another one."
            )
        into = torch.empty(tuple(sizes), dtype=self.dtype_of(key))
        try:
            self._reader.read_data(LoadPlan(items), _Into(into))
        # whatever a parser that meets damaged bytes raises
        except Exception as error:
            raise self._unreadable(error) from error
        return into

    def _unreadable(self, error: Exception) -> RunFailed:
        reason = (str(error).splitlines() or [""])[0]
        return RunFailed(
            f"{self.directory} cannot be read ({type(error).__name__}: {reason}); it is damaged, or of another version."
        )


class _Into(DefaultLoadPlanner):
    """Has what is read go into one tensor."""

    def __init__(self, into: Tensor) -> None:
        super().__init__()
        self._into = into

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        return narrow_tensor_by_index(self._into, read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: Any) -> None:
        pass
