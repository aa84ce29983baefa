"""python -m tools.gpu_check PART DEVICE FILE: runs one part, and adds each row to FILE as a line of JSON."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from tools.gpu_check.machine import Machine


def main() -> None:
    part, device, path = sys.argv[1:]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU")
    if part == "record":
        importlib.import_module("tools.gpu_check.training").record()
        return
    if device == "cpu" and part in ("correctness", "kernels", "training"):
        importlib.import_module("tools.gpu_check.interpreter").interpret()
    with Path(path).open("a") as file:
        rows = [describe(device)] if part == "describe" else run(part, device)
        for row in rows:
            file.write(json.dumps(row) + "\n")
            file.flush()


def run(part: str, device: str) -> Any:
    machine = Machine(torch.device(device, 0) if device == "cuda" else torch.device(device))
    return importlib.import_module(f"tools.gpu_check.{part}").run(machine)


def describe(device: str) -> dict[str, Any]:
    if device == "cpu":
        return {"type": device, "device": "CPU, Triton's interpreter: no figure says anything about a GPU"}
    properties = torch.cuda.get_device_properties(0)
    return {
        "type": device,
        "device": properties.name,
        "memory GB": properties.total_memory / 1e9,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }


if __name__ == "__main__":
    main()
