"""What ranks run: a run's checkpoint, and the same weights as the trainer itself exports them."""

from pathlib import Path

import torch

from sdpo_megatron.run_dir.checkpoint_files import CHECKPOINTS
from sdpo_megatron.trainer.checkpoint import Checkpoints
from sdpo_megatron.trainer.export import export_hf
from tests.distributed.learning import Trainer, read_samples


def save_and_export(model: str, samples: str, run: str, layout: dict[str, int]) -> None:
    """Two steps in bfloat16 with an average as teacher; then the checkpoint of the run, `policy` and `teacher`."""
    teacher = {"name": "ema", "ema_rate": 0.3}
    trainer = Trainer(model, layout, dtype=torch.bfloat16, teacher=teacher)
    for step in range(2):
        trainer.step(read_samples(samples), step)
    identity = {"model.path": model, "model.dtype": "bfloat16", "teacher.name": "ema"}
    store = Checkpoints(
        Path(run) / CHECKPOINTS,
        keep=2,
        shape=trainer.shape,
        identity=identity,
        reference=None,
        parallel=trainer.parallel,
    )
    store.save(2, trainer.state)
    assert trainer.teacher is not None and trainer.teacher.own is not None
    for name, chunks in (("policy", trainer.chunks), ("teacher", trainer.teacher.own.chunks)):
        export_hf(Path(run) / name, chunks, trainer.shape, Path(model), trainer.parallel, steps=2)
