"""A directory of checkpoints: which of them are complete, and which may go. Plain files, no megatron.

    checkpoints/000010/           after ten training steps
        manifest.json             written last: what is inside, and every file's size
        loop.json                 the training loop's own state
        rng_00000.pt              random states of rank 0, for the same layout only
        common.pt  metadata.json  .metadata  __0_0.distcp ...   megatron's torch_dist format

A checkpoint without a manifest, or with a file missing or cut short, was left behind by a crash: it is never
loaded, and the next save removes it.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdpo_megatron.files import sync_directory, write_atomically

MANIFEST = "manifest.json"


def checkpoint_path(directory: Path, step: int) -> Path:
    """Where the state after `step` training steps belongs."""
    return directory / f"{step:06d}"


def read_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """The manifest of a complete checkpoint; None where it is missing, damaged, or not true of the files."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        sizes = manifest["files"].items()
        whole = bool(sizes) and all((checkpoint / name).stat().st_size == size for name, size in sizes)
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if whole else None


def complete_checkpoints(directory: Path) -> list[Path]:
    """Oldest first."""
    return [path for path in _numbered(directory) if read_manifest(path) is not None]


def newest_checkpoint(directory: Path) -> Path | None:
    """The complete one with the most steps; None where there is none."""
    for path in reversed(_numbered(directory)):
        if read_manifest(path) is not None:
            return path
    return None


def passed_over(directory: Path, chosen: Path | None) -> list[Path]:
    """The incomplete ones that are newer than `chosen`."""
    numbered = _numbered(directory)
    return numbered if chosen is None else [path for path in numbered if int(path.name) > int(chosen.name)]


def write_manifest(checkpoint: Path, content: Mapping[str, Any]) -> None:
    """Declare `checkpoint` complete, once the disk holds all of its files."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_directory(checkpoint)
    sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}
    write_atomically(checkpoint / MANIFEST, json.dumps({**content, "files": sizes}, indent=1))
    sync_directory(checkpoint.parent)


def remove_checkpoint(checkpoint: Path) -> None:
    """The manifest goes first: whatever stops the removal, what is left does not count as complete."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def remove_incomplete(directory: Path) -> None:
    for path in _numbered(directory):
        if read_manifest(path) is None:
            remove_checkpoint(path)


def remove_older(directory: Path, keep: int) -> None:
    """Leave the newest `keep` complete checkpoints."""
    for path in complete_checkpoints(directory)[:-keep]:
        remove_checkpoint(path)


def _numbered(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    numbered = [path for path in directory.iterdir() if path.is_dir() and path.name.isdecimal()]
    return sorted(numbered, key=lambda path: int(path.name))
