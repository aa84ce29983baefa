"""What a Hugging Face directory holds, by its config.json and the headers of its files; all that is wrong with it."""

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sdpo_megatron.errors import ConfigError
from sdpo_megatron.models.shape import ModelShape, read_model_shape
from sdpo_megatron.models.weight_files import (
    DTYPES,
    described,
    may_be_left,
    tensor_headers,
    weight_files,
    weights_sha256,
)
from sdpo_megatron.run_dir.export_record import exported_base, exported_steps


def directory_contents(directory: Path, *, verify: bool = False) -> dict[str, Any]:
    """Returns a description, JSON-serialisable: `whole`, and if not, `problems` in a line each. `bytes` are those of
    tensors. With `verify` every tensor is read: numbers that are not finite are problems, and `weights_sha256` is the
    same for the same weights in other files."""
    problems: list[str] = []
    shape: ModelShape | None = _or_problem(lambda: read_model_shape(directory, "the model"), problems)
    files: list[Path] = _or_problem(lambda: weight_files(directory, "the model"), problems) or []
    tensors: dict[str, tuple[str, list[int]]] = {}
    for file in files:
        tensors |= _or_problem(lambda file=file: tensor_headers(file), problems) or {}
    # a file that cannot be read would be all that is missing
    against = _against_table(tensors, shape, problems) if shape is not None and not problems else {}
    dtypes: dict[str, dict[str, int]] = {}
    for name, (dtype, size) in tensors.items():
        counts = dtypes.setdefault(dtype, {"tensors": 0, "numbers": 0})
        counts["tensors"] += 1
        counts["numbers"] += math.prod(size)
        if dtype not in DTYPES and counts["tensors"] == 1:
            problems.append(f"{name} is of type {dtype}; supported: {', '.join(DTYPES)}")
    found: dict[str, Any] = {
        "kind": "model",
        "path": str(directory),
        "model": None if shape is None else asdict(shape),
        "parameters": None if shape is None else sum(math.prod(size) for _, size in described(shape)),
        "tensors": len(tensors),
        "dtypes": dtypes,
        "files": {file.name: file.stat().st_size for file in files},
        "bytes": sum(DTYPES.get(dtype, 1) * counts["numbers"] for dtype, counts in dtypes.items()),
        "trained_steps": exported_steps(directory),
        "trained_from_sha256": exported_base(directory),
        **against,
    }
    if verify and not problems:
        problems += _not_finite(directory)
        found["weights_sha256"] = weights_sha256(directory)
    return {**found, "verified": verify, "whole": not problems, "problems": problems}


def _or_problem(read: Callable[[], Any], problems: list[str]) -> Any:
    try:
        return read()
    except ConfigError as error:
        problems.append(error.message)
        return None


def _against_table(
    tensors: dict[str, tuple[str, list[int]]], shape: ModelShape, problems: list[str]
) -> dict[str, Any]:
    wanted = dict(described(shape))
    missing = [name for name in wanted if name not in tensors]
    left_out = sorted(name for name in tensors if name not in wanted and may_be_left(name, shape))
    others = sorted(name for name in tensors if name not in wanted and name not in left_out)
    for name, size in wanted.items():
        if name in tensors and tensors[name][1] != size:
            problems.append(f"{name} has the shape {tensors[name][1]}, but config.json describes {size}")
    for what, names in (("has no", missing), ("has no use for", others)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            problems.append(f"it {what} {names[0]}{more}, by the table of {shape.architecture}")
    return {"missing": missing, "others": others, "left_out": left_out}


def _not_finite(directory: Path) -> list[str]:
    # takes seconds to import
    import torch

    from sdpo_megatron.models.hf_tensors import hf_tensors

    counts = {name: int((~torch.isfinite(tensor)).sum()) for name, tensor in hf_tensors(directory)}
    return [
        f"{name} holds {count:,} numbers that are NaN or infinite" for name, count in counts.items() if count
    ]
