"""Checkpoints that would run a program, or load something else, if they were read as torch reads them."""

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sdpo_megatron.run_dir.checkpoint_files import (
    MANIFEST,
    read_manifest,
    seal,
    write_manifest,
    written_files,
)


class Runs:
    """A pickle of it makes a file when it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


def metadata_itself(checkpoint: Path, proof: Path) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Runs(proof)))


def part_of_the_metadata(checkpoint: Path, proof: Path) -> None:
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    metadata.planner_data = Runs(proof)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def an_object_in_the_shards(checkpoint: Path, proof: Path) -> None:
    """torch reads what the metadata calls bytes with all of pickle's powers."""
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    stream = io.BytesIO()
    torch.save([Runs(proof)], stream)
    (checkpoint / "__9_9.distcp").write_bytes(stream.getvalue())
    for index, info in metadata.storage_data.items():
        if "_extra_state" in index.fqn:
            info.relative_path, info.offset, info.length = "__9_9.distcp", 0, len(stream.getvalue())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def tensors_of_another_directory(checkpoint: Path, proof: Path) -> None:
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = f"../elsewhere/{info.relative_path}"
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def states(name: str) -> Callable[[Path, Path], None]:
    def forge(checkpoint: Path, proof: Path) -> None:
        torch.save({"python": Runs(proof)}, checkpoint / name)
        assert zipfile.is_zipfile(checkpoint / name)

    return forge


FORGERIES: dict[str, Callable[[Path, Path], None]] = {
    "metadata": metadata_itself,
    "part of the metadata": part_of_the_metadata,
    "object": an_object_in_the_shards,
    "elsewhere": tensors_of_another_directory,
    "common": states("common.pt"),
    "random states": states("rng_00000.pt"),
}


def forge(checkpoint: Path, kind: str, proof: Path) -> None:
    """Forges a checkpoint so that size, checksum and manifest are right."""
    manifest = read_manifest(checkpoint)
    assert manifest is not None
    FORGERIES[kind](checkpoint, proof)
    reseal(checkpoint, manifest)


def reseal(checkpoint: Path, manifest: dict[str, Any]) -> None:
    """Writes a manifest with these values whose checksums are right."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    content = json.loads(json.dumps(manifest))
    write_manifest(checkpoint, content, seal(checkpoint, written_files(checkpoint)))
