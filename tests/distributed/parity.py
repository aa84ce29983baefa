"""What ranks run: every model of the parity table, one after another."""

from pathlib import Path
from typing import Any

import torch

from sdpo_megatron.config import ParallelSettings
from sdpo_megatron.trainer import norms
from sdpo_megatron.trainer.parallel import initialize
from tests.distributed.learning import learn
from tests.distributed.weights import write_logits


def compute(
    models: dict[str, str], ids: list[int], samples: str, out: str, layout: dict[str, Any]
) -> dict[str, Any]:
    """What `learn` returns, by model. Below `out`/NAME: float32.safetensors and bfloat16.safetensors with the logits of
    `ids`, and the gradients."""
    parallel = initialize(ParallelSettings(**layout), device=torch.device("cpu"), seed=1)
    results = {}
    for name, directory in models.items():
        place = Path(out) / name
        place.mkdir(parents=True, exist_ok=True)
        for dtype in (torch.float32, torch.bfloat16):
            file = place / f"{str(dtype).removeprefix('torch.')}.safetensors"
            write_logits(directory, ids, file, parallel, dtype)
        results[name] = learn(directory, samples, str(place / "gradients"), layout, {}, parallel)
    parallel.barrier()
    return results


def norm_each_rank_alone(directory: str, ids: list[int], out: str) -> None:
    """The logits at TP 2 if a rank took the mean of squares of its own heads for that of all."""
    parallel = initialize(ParallelSettings(tp=2), device=torch.device("cpu"), seed=1)
    norms.reduce_from_tensor_model_parallel_region = lambda own, group: own * group.size()
    write_logits(directory, ids, Path(out), parallel, torch.float32)
    parallel.barrier()
