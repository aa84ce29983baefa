"""What a checkpoint's manifest says, and what of it a run that goes on must have again.

Weights that only teach and never change are not in a checkpoint: its manifest names the Hugging Face directory that
they come from, and their content by SHA-256.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sdpo_megatron.errors import UserError
from sdpo_megatron.models.shape import ModelShape
from sdpo_megatron.models.weight_files import weight_files
from sdpo_megatron.run_dir.checkpoint_files import FORMAT, check_format, sha256_of
from sdpo_megatron.trainer.parallel import ParallelState

ANNOUNCED_BYTES = 10 * 2**30
"""Size of weight files from which on reading them once more is announced: some ten seconds on one rank."""
SHOWN_OF_A_HASH = 12


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Weights that only teach and never change."""

    directory: Path
    sha256: str
    """The SHA-256 of what `sha256sum` prints of the directory's weight files in the order of their names."""


def read_reference(directory: Path, parallel: ParallelState, announce: Callable[[str], None]) -> Reference:
    """Reads the weights in the Hugging Face directory `directory` once, all ranks together, each its share of the
    files. `announce` is told in one line where that takes long. Raises ConfigError where a file is missing."""
    files = weight_files(directory)
    size = sum(file.stat().st_size for file in files)
    if parallel.is_main and size >= ANNOUNCED_BYTES:
        announce(f"Reading the teacher's weights ({size / 2**30:.0f} GiB) in {directory} for their SHA-256")
    share = files[parallel.rank :: parallel.world_size]
    own = parallel.everywhere(lambda: {file.name: sha256_of(file) for file in share})
    digests = {name: digest for part in parallel.gather(own) for name, digest in part.items()}
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return Reference(directory=directory, sha256=hashlib.sha256(lines.encode()).hexdigest())


def manifest_of(
    step: int,
    layout: dict[str, int],
    shape: ModelShape,
    identity: dict[str, Any],
    reference: Reference | None,
) -> dict[str, Any]:
    """Returns what a checkpoint after `step` training steps says of itself, but for its files; JSON-serialisable."""
    named = None
    if reference is not None:
        named = {"directory": str(reference.directory.absolute()), "sha256": reference.sha256}
    return {
        "format": FORMAT,
        "step": step,
        "layout": layout,
        "model": asdict(shape),
        "reference": named,
        "identity": identity,
        "versions": {name: version(name) for name in ("torch", "megatron-core")},
    }


def check_model(path: Path, manifest: dict[str, Any], shape: ModelShape) -> None:
    """Raises UserError where the checkpoint `path` is of another format or of another model."""
    check_format(path, manifest)
    if (found := unlike(manifest, shape)) is not None:
        key, saved, own = found
        raise UserError(
            f"{path} holds a model whose {key} is {saved}, but model.path has {own}: "
            "give the run another name, or the model it was started with."
        )


def unlike(manifest: dict[str, Any], shape: ModelShape) -> tuple[str, Any, Any] | None:
    """Returns the first field of `shape` in which the checkpoint's model differs, with the checkpoint's value and its
    own; None where it is such a model."""
    own = json.loads(json.dumps(asdict(shape)))
    for key in own:
        if manifest["model"].get(key) != own[key]:
            return key, manifest["model"].get(key), own[key]
    return None


def check_reference(path: Path, manifest: dict[str, Any], reference: Reference | None) -> None:
    """Raises UserError where the checkpoint `path` was made with another teacher's weights than `reference`."""
    saved = manifest["reference"]
    # a run directory is continued only with the same teacher.name and loss.name; the checkpoint may be another's
    if (saved is None) != (reference is None):
        raise UserError(
            f"{path} was made with {'no' if saved is None else 'a'} teacher whose weights never change, unlike this "
            "run: put the run's own checkpoint back, or choose another run.name."
        )
    if reference is not None and saved["sha256"] != reference.sha256:
        raise UserError(
            f"{path} was made with the teacher's weights in {saved['directory']} (SHA-256 "
            f"{saved['sha256'][:SHOWN_OF_A_HASH]}...), but {reference.directory} holds others (SHA-256 "
            f"{reference.sha256[:SHOWN_OF_A_HASH]}...): put those back, or choose another run.name."
        )
