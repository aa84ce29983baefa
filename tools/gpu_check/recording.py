"""What a CPU computed in float32 of one learning step, and how near another computation comes to it.

The samples are two problems of the demo's first step; the server's log-probabilities are those of a uniform choice,
which is near what random weights give. Of each tensor's gradient the norm and a few entries are kept, at places drawn
from its name."""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdpo_megatron.records import Sample

RECORDING = Path(__file__).with_name("recording.json")
ENTRIES = 16


def read() -> dict[str, Any]:
    """Returns `samples`, and by model: `loss`, `student` and `teacher` log-probabilities, `gradients`."""
    recorded = json.loads(RECORDING.read_text())
    return {**recorded, "samples": [Sample(**sample) for sample in recorded["samples"]]}


def generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def digest(name: str, gradient: Tensor) -> list[float]:
    """Returns the norm and, at places that depend on the name alone, ENTRIES entries."""
    places = torch.randint(gradient.numel(), (ENTRIES,), generator=generator(f"entries of {name}"))
    flat = gradient.detach().flatten()
    return [
        float(f"{x:.6g}")
        for x in (float(flat.float().norm()), *flat[places.to(flat.device)].float().tolist())
    ]


def compare(got: Mapping[str, Any], recorded: Mapping[str, Any]) -> dict[str, float]:
    """Returns the relative errors of the loss and of the gradient of the worst tensor and of all; nats of
    log-probabilities."""
    if set(got["gradients"]) != set(recorded["gradients"]):
        raise AssertionError("other tensors have gradients than in the recording; make it again: --record")
    worst, squares, sizes = 0.0, 0.0, 0.0
    for name, (norm, *entries) in recorded["gradients"].items():
        expected = torch.tensor(entries, dtype=torch.float64)
        error = float((torch.tensor(got["gradients"][name][1:], dtype=torch.float64) - expected).norm())
        worst = max(worst, error / float(expected.norm()), abs(got["gradients"][name][0] - norm) / norm)
        squares, sizes = squares + error**2, sizes + float(expected.norm()) ** 2
    return {
        "loss error": abs(got["loss"] - recorded["loss"]) / abs(recorded["loss"]),
        "student error": _largest(got["student"], recorded["student"]),
        "teacher error": _largest(got["teacher"], recorded["teacher"]),
        "gradient error": (squares / sizes) ** 0.5,
        "worst tensor": worst,
    }


def _largest(got: list[float], expected: list[float]) -> float:
    return float((torch.tensor(got) - torch.tensor(expected)).abs().max())
