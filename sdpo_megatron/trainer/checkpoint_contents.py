"""What a checkpoint holds, by its manifest and torch's description of its tensors; all that is wrong with it.

No megatron is imported and, but to verify, no tensor is read."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from sdpo_megatron.errors import ReportedError
from sdpo_megatron.models.shape import ModelShape
from sdpo_megatron.models.weight_files import described
from sdpo_megatron.run_dir.checkpoint_files import (
    MANIFEST,
    OWN_CHECKSUM,
    check_format,
    damaged,
    read_manifest,
    why_incomplete,
    written_files,
)
from sdpo_megatron.trainer.checkpoint_metadata import read_metadata, stored_shape

POLICY = "policy"
PARTS = {
    POLICY: "policy",
    "optimizer.state.average": "teacher: the policy's average",
    "optimizer.state.param": "optimizer: the policy in float32",
    "optimizer.state.exp_avg": "optimizer: first moments",
    "optimizer.state.exp_avg_sq": "optimizer: second moments",
}
"""How the names of tensors begin -> what they are."""
STATES = "_extra_state"
"""What Transformer Engine keeps in a layer besides its weights."""


def checkpoint_contents(checkpoint: Path, *, verify: bool = False) -> dict[str, Any]:
    """Returns a description, JSON-serialisable: `whole`, and if not, `problems` in a line each. With `verify` every
    file is read and held against its SHA-256."""
    problems = why_incomplete(checkpoint)
    names = written_files(checkpoint)
    found: dict[str, Any] = {
        "kind": "checkpoint",
        "path": str(checkpoint),
        "files": {name: (checkpoint / name).stat().st_size for name in names},
        "bytes": sum((checkpoint / name).stat().st_size for name in names),
    }
    manifest = read_manifest(checkpoint)
    if manifest is not None:
        try:
            check_format(checkpoint, manifest)
            found |= _by_manifest(manifest)
            shape = stored_shape(checkpoint, manifest)
            found["parameters"] = sum(math.prod(size) for _, size in described(shape))
            entries = _tensors(read_metadata(checkpoint))
            found["parts"] = _parts(entries) + _random_states(found["files"])
            problems += _against_table(entries, shape)
        except ReportedError as error:
            problems.append(error.message)
        if verify:
            wrong = damaged(checkpoint, manifest, sorted(manifest["files"]))
            problems += [f"{name} does not hold what was saved: its SHA-256 is another" for name in wrong]
    return {**found, "verified": verify, "whole": not problems, "problems": problems}


def _by_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("format", "step", "layout", "model", "reference", "identity", "versions", "sha256")
    return {key: manifest.get(key) for key in keys} | {f"{MANIFEST}_sha256": manifest[OWN_CHECKSUM]}


def _tensors(metadata: Any) -> dict[str, TensorStorageMetadata]:
    described_by_name = metadata.state_dict_metadata.items()
    return {name: entry for name, entry in described_by_name if isinstance(entry, TensorStorageMetadata)}


def _parts(entries: Mapping[str, TensorStorageMetadata]) -> list[dict[str, Any]]:
    parts: dict[str, dict[str, Any]] = {}
    for name, entry in sorted(entries.items(), key=lambda item: _order(item[0])):
        begin = _begin(name)
        part = parts.setdefault(
            begin,
            {"name": PARTS.get(begin, begin), "tensors": 0, "numbers": 0, "bytes": 0, "dtypes": []},
        )
        dtype = str(entry.properties.dtype).removeprefix("torch.")
        part["tensors"] += 1
        part["numbers"] += entry.size.numel()
        part["bytes"] += entry.size.numel() * entry.properties.dtype.itemsize
        if dtype not in part["dtypes"]:
            part["dtypes"].append(dtype)
    return list(parts.values())


def _begin(name: str) -> str:
    found = [begin for begin in PARTS if name.startswith(f"{begin}.")]
    return found[0] if found else name.partition(".")[0]


def _order(name: str) -> tuple[int, str]:
    begin = _begin(name)
    return (list(PARTS).index(begin) if begin in PARTS else len(PARTS), name)


def _random_states(files: Mapping[str, int]) -> list[dict[str, Any]]:
    sizes = [size for name, size in files.items() if name.startswith("rng_")]
    ranks = f"random states of {len(sizes)} rank{'s' if len(sizes) != 1 else ''}"
    return [{"name": ranks, "tensors": 0, "numbers": 0, "bytes": sum(sizes), "dtypes": []}] if sizes else []


def _against_table(entries: Mapping[str, TensorStorageMetadata], shape: ModelShape) -> Iterator[str]:
    """What the policy lacks of such a model, or has beyond it. Rows that fill up the vocabulary are none."""
    wanted: dict[tuple[str, ...], int] = {}
    for parameter in shape.parameters():
        names = tuple(f"{POLICY}.{name}" for name in parameter.stored())
        size = sum(math.prod(size) for size in shape.sizes_of(parameter).values())
        wanted[names] = wanted.get(names, 0) + size
    known: set[str] = set()
    for names, size in wanted.items():
        found = next((name for name in names if name in entries), None)
        if found is None:
            yield f"it has no {names[-1]}, by the table of {shape.architecture}"
            continue
        known.add(found)
        numbers = entries[found].size.numel()
        if numbers < size or (numbers > size and entries[found].size[0] <= shape.vocab):
            yield f"{found} holds {numbers:,} numbers, not {size:,}"
    for name in entries:
        if _begin(name) == POLICY and name not in known and STATES not in name:
            yield f"it has {name}, which the table of {shape.architecture} has not"
