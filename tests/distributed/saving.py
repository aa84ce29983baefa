"""What ranks run: checkpoints of a small trainer."""

import hashlib
import resource
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sdpo_megatron.conversion.sources import find_megatron
from sdpo_megatron.errors import RunFailed, UserError
from sdpo_megatron.trainer.build import NEVER_CHANGING
from sdpo_megatron.trainer.checkpoint import Checkpoints
from sdpo_megatron.trainer.manifest import read_reference
from tests.distributed.learning import Trainer, read_samples
from tests.gathered import flat

from megatron.core import dist_checkpointing  # isort: skip


def checkpoints(trainer: Trainer, directory: str, keep: int = 2) -> Checkpoints:
    reference = None
    if trainer.teacher is not None and trainer.teacher.settings.name in NEVER_CHANGING:
        reference = read_reference(trainer.reference_directory, trainer.parallel, print)
    return Checkpoints(
        Path(directory),
        keep=keep,
        shape=trainer.shape,
        identity={"seed": 1},
        reference=reference,
        parallel=trainer.parallel,
    )


def digest(trainer: Trainer) -> str:
    """Of everything a step depends on: weights of both sets, moments, step counts, schedule, random state."""
    inner = trainer.optimizer.chained_optimizers[0].optimizer
    own = trainer.teacher.own if trainer.teacher is not None else None
    chunks = [*trainer.chunks, *(own.chunks if own is not None else [])]
    tensors = [p.detach() for chunk in chunks for p in chunk.parameters()]
    for group in inner.param_groups:
        for parameter in group["params"]:
            tensors += [
                parameter.detach(),
                *(inner.state[parameter][k] for k in ("step", "exp_avg", "exp_avg_sq")),
            ]
    tensors.append(torch.get_rng_state())
    progress = [trainer.schedule.num_steps, [group["lr"] for group in inner.param_groups]]
    whole = hashlib.sha256(repr(progress).encode())
    for tensor in tensors:
        whole.update(_bits(tensor).numpy().tobytes())
    return whole.hexdigest()


def train(
    model: str,
    samples: str,
    layout: dict[str, Any],
    steps: list[int],
    save: str | None = None,
    load: str | None = None,
    optimizer: dict[str, Any] | None = None,
    dtype: str = "float32",
    teacher: dict[str, Any] | None = None,
    reference: str | None = None,
) -> dict[str, Any]:
    """The given steps, after loading from `load` and before saving to `save`; 0 steps are possible. The reference's
    weights are those in `reference`, by default in `model`."""
    settings = {"schedule": "linear", "warmup_steps": 1, **(optimizer or {})}
    trainer = Trainer(
        model,
        layout,
        reference=reference,
        optimizer=settings,
        dtype=getattr(torch, dtype),
        teacher=teacher,
    )
    done = 0
    if load:
        store = checkpoints(trainer, load)
        newest = store.newest()
        assert newest is not None
        done = store.load(newest, trainer.state)
        if trainer.teacher is not None:
            trainer.teacher.show_average()
    metrics = []
    for step in steps:
        given = read_samples(samples)
        batch, learned = trainer.step(given, step)
        seen = flat(batch, trainer.parallel, given)
        metrics.append([learned, seen["student"].tolist(), seen["teacher"].tolist()])
    if save:
        checkpoints(trainer, save).save(done + len(steps), trainer.state)
    group = trainer.optimizer.param_groups[0]
    return {
        "first_step": done,
        "metrics": metrics,
        "digest": digest(trainer),
        "lr": group["lr"],
        "betas": group["betas"],
    }


def save_some(model: str, directory: str, steps: list[int], keep: int) -> list[str]:
    """Names left after saving the same state under each of the step numbers."""
    trainer = Trainer(model, {})
    for step in steps:
        checkpoints(trainer, directory, keep).save(step, trainer.state)
    return sorted(path.name for path in Path(directory).iterdir())


def same_content(first: str, second: str, vocabulary: int) -> int:
    """Number of tensors in two checkpoints, which are bit-equal but for rows that pad the vocabulary."""
    dist.init_process_group("gloo")
    left, right = (dist_checkpointing.load_plain_tensors(path) for path in (first, second))
    assert left.keys() == right.keys(), left.keys() ^ right.keys()
    names = [name for name, value in left.items() if isinstance(value, Tensor)]
    for name in names:
        tensor, other = left[name], right[name]
        if "word_embeddings" in name or "output_layer" in name:
            assert not tensor[vocabulary:].any() and not other[vocabulary:].any(), name
            tensor, other = tensor[:vocabulary], other[:vocabulary]
        assert torch.equal(_bits(tensor), _bits(other)), name
    common = [dist_checkpointing.load_common_state_dict(path) for path in (first, second)]
    steps = [{group["step"] for group in one["optimizer"]["optimizer"]["param_groups"]} for one in common]
    assert steps[0] == steps[1] and len(steps[0]) == 1
    assert common[0]["schedule"] == common[1]["schedule"]
    return len(names)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def save_on_a_full_disk(model: str, directory: str, full_on: int, room: int) -> list[str]:
    """Saves step 1, then step 2 where rank `full_on` cannot write files over `room` bytes, then step 2 again.

    Returns the error, what it left behind, and what is there in the end.
    """
    trainer = Trainer(model, {"pp": 2})
    store = checkpoints(trainer, directory)
    store.save(1, trainer.state)
    message = ""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if trainer.parallel.rank == full_on:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        store.save(2, trainer.state)
    except RunFailed as error:
        message = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    after = sorted(path.name for path in Path(directory).iterdir())
    newest = store.newest()
    trainer.parallel.barrier()
    store.save(2, trainer.state)
    return [message, str(after), str(newest), str(store.newest())]


def read_weights(checkpoint: Path, model: str) -> None:
    """As a conversion does."""
    reader = find_megatron(str(checkpoint), "policy", model, print).weights.reader
    for key in reader.keys():
        sizes = reader.sizes_of(key)
        reader.read(key, [0] * len(sizes), sizes)


def load_each(model: str, directories: list[str]) -> list[str]:
    """The error of loading the newest checkpoint of each directory into a trainer, and of reading its weights alone."""
    trainer = Trainer(model, {})
    said = []
    for directory in directories:
        store = checkpoints(trainer, directory)
        newest = store.newest()
        assert newest is not None
        for load in (
            lambda store=store, newest=newest: store.load(newest, trainer.state),
            lambda newest=newest: read_weights(newest, model),
        ):
            try:
                load()
                said.append("")
            except (UserError, RunFailed) as error:
                said.append(str(error))
    return said


def load_into(model: str, directory: str, layout: dict[str, Any], reference: str | None = None) -> str:
    """The error of loading the newest checkpoint into this model, beside the weights in `reference`, by default in
    `model`; empty if it loads."""
    trainer = Trainer(model, layout, reference=reference)
    store = checkpoints(trainer, directory)
    newest = store.newest()
    assert newest is not None
    try:
        store.load(newest, trainer.state)
    except (UserError, RunFailed) as error:
        return str(error)
    return ""
