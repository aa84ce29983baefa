"""What a checkpoint holds, by its manifest and torch's description of its tensors; all that is wrong with it.

No megatron is imported and, but to verify, no tensor is read."""

import math
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sdpo_megatron.errors import ReportedError, UserError
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
from sdpo_megatron.trainer.dist_reading import DistReader

POLICY = "policy"
"""The weights' name in a checkpoint."""
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
            reader = DistReader(checkpoint)
            found["parts"] = _parts(reader) + _random_states(found["files"])
            problems += _against_table(reader, shape)
        except ReportedError as error:
            problems.append(error.message)
        if verify:
            wrong = damaged(checkpoint, manifest, sorted(manifest["files"]))
            problems += [f"{name} does not hold what was saved: its SHA-256 is another" for name in wrong]
    return {**found, "verified": verify, "whole": not problems, "problems": problems}


def stored_shape(checkpoint: Path, manifest: dict[str, Any]) -> ModelShape:
    """Returns the shape of the model whose weights a checkpoint holds. Raises UserError where this version knows no
    such model."""
    try:
        shape = TypeAdapter(ModelShape).validate_python(manifest["model"])
        assert shape.family
        return shape
    except (ValidationError, KeyError):
        raise UserError(
            f"{checkpoint} holds a model that this version does not describe in that way "
            f"({manifest['model'].get('architecture')}): read it with the version that saved it."
        ) from None


def _by_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("format", "step", "layout", "model", "reference", "identity", "versions", "sha256")
    return {key: manifest.get(key) for key in keys} | {f"{MANIFEST}_sha256": manifest[OWN_CHECKSUM]}


def _parts(reader: DistReader) -> list[dict[str, Any]]:
    parts = []
    for begin, names in groupby(sorted(reader.keys(), key=_order), key=_begin):
        tensors = [(math.prod(reader.sizes_of(name)), reader.dtype_of(name)) for name in names]
        parts.append(
            {
                "name": PARTS.get(begin, begin),
                "tensors": len(tensors),
                "numbers": sum(numbers for numbers, _ in tensors),
                "bytes": sum(numbers * dtype.itemsize for numbers, dtype in tensors),
                "dtypes": list(dict.fromkeys(str(dtype).removeprefix("torch.") for _, dtype in tensors)),
            }
        )
    return parts


def _begin(name: str) -> str:
    found = [begin for begin in PARTS if name.startswith(f"{begin}.")]
    return found[0] if found else name.partition(".")[0]


def _order(name: str) -> tuple[int, str, str]:
    begin = _begin(name)
    return (list(PARTS).index(begin) if begin in PARTS else len(PARTS), begin, name)


def _random_states(files: Mapping[str, int]) -> list[dict[str, Any]]:
    sizes = [size for name, size in files.items() if name.startswith("rng_")]
    ranks = f"random states of {len(sizes)} rank{'s' if len(sizes) != 1 else ''}"
    return [{"name": ranks, "tensors": 0, "numbers": 0, "bytes": sum(sizes), "dtypes": []}] if sizes else []


def _against_table(reader: DistReader, shape: ModelShape) -> Iterator[str]:
    """What the policy lacks of such a model, or has beyond it. Rows that fill up the vocabulary are none."""
    wanted: dict[tuple[str, ...], int] = {}
    for parameter in shape.parameters():
        names = tuple(f"{POLICY}.{name}" for name in parameter.stored())
        size = sum(math.prod(size) for size in shape.sizes_of(parameter).values())
        wanted[names] = wanted.get(names, 0) + size
    there, known = reader.keys(), set()
    for names, size in wanted.items():
        found = next((name for name in names if name in there), None)
        if found is None:
            yield f"it has no {names[-1]}, by the table of {shape.architecture}"
            continue
        known.add(found)
        stored = reader.sizes_of(found)
        numbers = math.prod(stored)
        if numbers < size or (numbers > size and stored[0] <= shape.vocab):
            yield f"{found} holds {numbers:,} numbers, not {size:,}"
    for name in there:
        if _begin(name) == POLICY and name not in known and STATES not in name:
            yield f"it has {name}, which the table of {shape.architecture} has not"
