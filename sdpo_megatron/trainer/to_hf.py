"""A checkpoint of a run as a Hugging Face directory, in a process of its own:

    python -m sdpo_megatron.trainer.to_hf CHECKPOINT MODEL OUT DTYPE

with the rank variables of a single rank. MODEL is the Hugging Face directory that training began with, DTYPE its
model.dtype.
"""

import sys
from pathlib import Path
from typing import Literal

import torch

from sdpo_megatron.config import ParallelSettings
from sdpo_megatron.models.shape import read_model_shape
from sdpo_megatron.terminal import reported
from sdpo_megatron.trainer.checkpoint import load_weights
from sdpo_megatron.trainer.export import export_hf
from sdpo_megatron.trainer.model import build_model
from sdpo_megatron.trainer.parallel import initialize


def checkpoint_to_hf(checkpoint: Path, model: Path, out: Path, dtype: Literal["float32", "bfloat16"]) -> int:
    """Writes `out` and returns the training steps that its weights have behind them. Raises UserError where the
    checkpoint is of another model, RunFailed where it is damaged or the disk full."""
    parallel = initialize(ParallelSettings(), device=torch.device("cpu"), seed=0)
    shape = read_model_shape(model)
    policy = build_model(shape, getattr(torch, dtype), parallel)
    steps = load_weights(checkpoint, policy, shape, parallel)
    export_hf(out, policy, shape, model, parallel, steps=steps)
    return steps


def main(argv: list[str]) -> int:
    checkpoint, model, out, dtype = argv
    assert dtype == "float32" or dtype == "bfloat16"

    def convert() -> int:
        checkpoint_to_hf(Path(checkpoint), Path(model), Path(out), dtype)
        return 0

    return reported(convert)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
