"""Checkpoints are read without running what they say, so that they can be handed on.

torch unpickles a checkpoint's `.metadata`, and the objects that it says are there, as any pickle: whoever wrote them
could run a program. `install()` has both read by unpicklers that know only the few classes of a checkpoint.
"""

import inspect
import io
import pathlib
import pickle
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import default_planner, filesystem, planner
from torch.distributed.checkpoint import metadata as classes
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.planner import ReadItem
from torch.serialization import _get_layout

DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
KNOWN: dict[tuple[str, str], Any] = {
    **{
        (classes.__name__, name): getattr(classes, name)
        for name in (
            *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
            *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
        )
    },
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    # megatron-core's own writer leaves each rank's plan in it
    **{
        (planner.__name__, name): getattr(planner, name)
        for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
    },
    **{("torch", name): getattr(torch, name) for name in ("Size", *DTYPES)},
    ("torch.serialization", "_get_layout"): _get_layout,
    ("pathlib", "PosixPath"): pathlib.PosixPath,
}
"""What `.metadata` is made of."""
ANCHORS = (
    (FileSystemReader.read_metadata, "pickle.load(metadata_file)"),
    (default_planner.DefaultLoadPlanner.load_bytes, "weights_only=False"),
)
"""The functions of torch that are replaced, and what each has that is wrong."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of a checkpoint")
        return KNOWN[module, name]


def read_metadata(self: FileSystemReader, *args: Any, **kwargs: Any) -> classes.Metadata:
    """Takes the place of `FileSystemReader.read_metadata`. Raises UnpicklingError where the file holds anything but a
    checkpoint's metadata, or leads to files of other directories."""
    with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as file:
        metadata = _Unpickler(file).load()
    if not isinstance(metadata, classes.Metadata):
        raise pickle.UnpicklingError(f"it is a {type(metadata).__name__}, not a checkpoint's metadata")
    for info in (metadata.storage_data or {}).values():
        if len(PurePosixPath(info.relative_path).parts) != 1 or info.relative_path == "..":
            raise pickle.UnpicklingError(f"it has tensors in {info.relative_path}, outside the checkpoint")
        if info.transform_descriptors:
            raise pickle.UnpicklingError("it asks for transformations, which no checkpoint of ours has")
    metadata.storage_meta = metadata.storage_meta or classes.StorageMeta()
    metadata.storage_meta.load_id = self.load_id
    return metadata


def check_metadata(checkpoint: Path) -> None:
    """Raises what `read_metadata` raises: torch would go on with other files where it cannot read this one."""
    FileSystemReader(checkpoint).read_metadata()


def load_bytes(self: Any, read_item: ReadItem, value: io.BytesIO) -> None:
    """Takes the place of `DefaultLoadPlanner.load_bytes`. Raises UnpicklingError where there is more than tensors,
    bytes and plain values."""
    with torch.serialization.safe_globals([io.BytesIO]):
        loaded = torch.load(value, weights_only=True)
    name = read_item.dest_index.fqn
    if self.flatten_state_dict:
        set_element(self.original_state_dict, self.mappings[name], loaded)
    else:
        self.state_dict[name] = loaded


def install() -> None:
    """Replaces torch's functions in this process. Raises RuntimeError where torch reads checkpoints in another way than
    the version that this was written for."""
    if FileSystemReader.read_metadata is read_metadata:
        return
    for function, unsafe in ANCHORS:
        if unsafe not in inspect.getsource(function):
            raise RuntimeError(
                f"torch {torch.__version__} reads checkpoints in another way than 2.13 ({function.__qualname__} has no "
                f"{unsafe}): install torch 2.13, or extend safe_reading.py."
            )
    FileSystemReader.read_metadata = read_metadata
    default_planner.DefaultLoadPlanner.load_bytes = load_bytes
