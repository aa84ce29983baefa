"""A directory of checkpoints: which of them are complete, and which may go. Plain files, no megatron.

    checkpoints/000010/           after ten training steps
        manifest.json             written last: what is inside, every file's size and SHA-256, and its own SHA-256
        rng_00000.pt              random states of rank 0, for the same layout only
        common.pt  metadata.json  .metadata  __0_0.distcp ...   megatron's torch_dist format

A checkpoint without a manifest, or with a file missing or cut short, was left behind by a crash: it is never
loaded, and the next save removes it. The checksums are for what no crash does, a disk that gives back other bytes.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any

from sdpo_megatron.errors import UserError
from sdpo_megatron.files import sync_directory, write_atomically

CHECKPOINTS = "checkpoints"
"""The directory of a run that holds them."""
MANIFEST = "manifest.json"
FORMAT = 4
"""What a manifest says of itself; others are for other versions to check."""
OWN_CHECKSUM = "manifest_sha256"
PARTS: dict[str, type | UnionType] = {
    **{"step": int, "layout": dict, "model": dict, "reference": dict | None, "identity": dict},
    **{"files": dict, "sha256": dict},
}
"""What else a manifest of this format has, and of which kind."""


def checkpoint_path(directory: Path, step: int) -> Path:
    """Returns where the state after `step` training steps belongs."""
    return directory / f"{step:06d}"


def read_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """Returns the manifest of a complete checkpoint; None where it is missing, damaged, or not true of the files."""
    manifest, wrong = _looked_at(checkpoint)
    return None if wrong else manifest


def why_incomplete(checkpoint: Path) -> list[str]:
    """Returns in a line each why `read_manifest` takes `checkpoint` for none; empty where it does not."""
    return _looked_at(checkpoint)[1]


def _looked_at(checkpoint: Path) -> tuple[dict[str, Any], list[str]]:
    """Returns the manifest, and what is wrong with it or with the files that it names."""
    damaged = f"{MANIFEST} is damaged"
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        # what it says is worth something only then
        if not manifest["files"] or (manifest.get("format") == FORMAT and not _is_whole(manifest)):
            return {}, [damaged]
        there = {name: _size_of(checkpoint / name) for name in manifest["files"]}
        return manifest, [
            f"{name} is missing" if there[name] is None else f"{name} has {there[name]:,} bytes, not {size:,}"
            for name, size in manifest["files"].items()
            if there[name] != size
        ]
    except (FileNotFoundError, NotADirectoryError):
        missing = "is missing: a crash left this behind, or it is being written"
        return {}, [f"{MANIFEST}, which is written last, {missing}"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}, [damaged]


def _size_of(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def find_checkpoint(text: str) -> Path | None:
    """Returns the directory of the checkpoint that `text` means: RUN@STEP; a run's directory, for its newest complete
    one; or a checkpoint's own directory, complete or not. None where it has none of these forms.

    Raises UserError where the run has no such checkpoint."""
    path = Path(text)
    run, at, step = text.rpartition("@")
    if at and step.isdecimal() and not path.exists():
        if not Path(run).is_dir():
            raise UserError(f"There is no directory {run}; name a run as RUN@STEP, or a checkpoint.")
        directory = Path(run) / CHECKPOINTS
        found = checkpoint_path(directory, int(step))
        if not found.is_dir():
            there = ", ".join(other.name for other in _numbered(directory)) or "none"
            raise UserError(f"{run} has no checkpoint of step {int(step)}; it has: {there}.")
        return found
    if (path / CHECKPOINTS).is_dir():
        newest = newest_checkpoint(path / CHECKPOINTS)
        if newest is None:
            raise UserError(
                f"{path} has no complete checkpoint yet; wait for one, or name a directory of weights."
            )
        return newest
    is_one = path.is_dir() and (path.name.isdecimal() or (path / MANIFEST).is_file())
    return path if is_one and not (path / "config.json").is_file() else None


def complete_checkpoints(directory: Path) -> list[Path]:
    """Returns the complete checkpoints, oldest first."""
    return [path for path in _numbered(directory) if read_manifest(path) is not None]


def newest_checkpoint(directory: Path) -> Path | None:
    """Returns the complete checkpoint with the most steps; None where there is none."""
    return next((path for path in reversed(_numbered(directory)) if read_manifest(path) is not None), None)


def passed_over(directory: Path, chosen: Path | None) -> list[Path]:
    """Returns the incomplete checkpoints that are newer than `chosen`."""
    numbered = _numbered(directory)
    return numbered if chosen is None else [path for path in numbered if int(path.name) > int(chosen.name)]


def written_files(checkpoint: Path) -> list[str]:
    """Returns the names of all files, relative to `checkpoint`. Must be called on one rank alone: network file systems
    show what other machines write at different times."""
    return sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file())


def seal(checkpoint: Path, names: Sequence[str]) -> dict[str, str]:
    """Has the disk hold these files, and returns their SHA-256 by name."""
    digests = {}
    for name in names:
        with (checkpoint / name).open("rb") as file:
            os.fsync(file.fileno())
        digests[name] = sha256_of(checkpoint / name)
    return digests


def write_manifest(checkpoint: Path, content: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    """Declares `checkpoint` complete; `digests` is what `seal` returned of all its files."""
    sync_directory(checkpoint)
    sizes = {name: (checkpoint / name).stat().st_size for name in sorted(digests)}
    manifest = {**content, "files": sizes, "sha256": dict(sorted(digests.items()))}
    manifest[OWN_CHECKSUM] = _checksum(manifest)
    write_atomically(checkpoint / MANIFEST, json.dumps(manifest, indent=1))
    sync_directory(checkpoint.parent)


def check_format(checkpoint: Path, manifest: Mapping[str, Any]) -> None:
    """Raises UserError where what `read_manifest` returned is of another format, of which nothing else is known."""
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{checkpoint} has the checkpoint format {manifest.get('format')}, but this version reads format {FORMAT}: "
            "go on with the version that saved it, or choose another run.name."
        )


def _is_whole(manifest: Mapping[str, Any]) -> bool:
    has_parts = all(name in manifest and isinstance(manifest[name], kind) for name, kind in PARTS.items())
    return has_parts and manifest.get(OWN_CHECKSUM) == _checksum(manifest)


def _checksum(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != OWN_CHECKSUM}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def damaged(checkpoint: Path, manifest: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Returns which of these files do not hold what `seal` found in them, or cannot be read any more."""

    def holds(name: str) -> bool:
        try:
            return sha256_of(checkpoint / name) == manifest["sha256"].get(name)
        except OSError:
            return False

    return [name for name in names if not holds(name)]


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of the file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_checkpoint(checkpoint: Path) -> None:
    """Removes `checkpoint`, its manifest first: whatever stops the removal, what is left does not count as complete."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def remove_incomplete(directory: Path) -> None:
    for path in _numbered(directory):
        if read_manifest(path) is None:
            remove_checkpoint(path)


def remove_older(directory: Path, keep: int) -> None:
    """Removes all complete checkpoints but the newest `keep`."""
    for path in complete_checkpoints(directory)[:-keep]:
        remove_checkpoint(path)


def _numbered(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    numbered = [path for path in directory.iterdir() if path.is_dir() and path.name.isdecimal()]
    return sorted(numbered, key=lambda path: int(path.name))
