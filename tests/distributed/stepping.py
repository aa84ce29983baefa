"""What ranks run: optimizer steps against AdamW in float64, and those that must not be taken."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from sdpo_megatron.algorithm import examination
from sdpo_megatron.config import OptimizerSettings, RolloutSettings
from sdpo_megatron.errors import RunFailed, TeacherRefused
from sdpo_megatron.run import Run
from sdpo_megatron.trainer import microbatch_loss
from sdpo_megatron.trainer.hf_weights import stream_hf_weights
from tests.distributed.learning import Trainer, read_samples

STEPS = 4
SETTINGS = {"lr": 1e-2, "warmup_steps": 2, "min_lr": 1e-3, "weight_decay": 0.3, "beta1": 0.8, "beta2": 0.95,
            "eps": 1e-4, "clip_grad_norm": 0.05}  # fmt: skip
"""Each in the size that shows."""


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    """Of this stage, by Hugging Face name."""
    stream = stream_hf_weights(trainer.chunks, trainer.shape, trainer.parallel)
    return {name: tensor.clone() for name, tensor in stream}


def distance_from_adamw(
    model: str, samples: str, layout: dict[str, Any], schedule: str
) -> tuple[float, list[float]]:
    """(the largest difference of a weight in any step, learning rates)."""
    settings = OptimizerSettings(**SETTINGS, schedule=schedule)  # type: ignore[arg-type]
    trainer = Trainer(model, layout, optimizer=settings.model_dump())
    kept = trainer.keep_gradients()
    plain = {name: w.double() for name, w in weights_of(trainer).items()}
    moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in plain.items()}
    worst, rates = 0.0, []
    for step in range(STEPS):
        _, metrics = trainer.step(read_samples(samples), step)
        rates.append(metrics["optim/lr"])
        norm = metrics["optim/grad_norm"]
        assert norm > 2 * settings.clip_grad_norm
        for name, gradient in kept[-1].items():
            scaled = gradient.double() * settings.clip_grad_norm / norm
            plain[name] = adamw(plain[name], scaled, *moments[name], step + 1, rates[-1], settings)
        worst = max(worst, *(float((w - plain[name]).abs().max()) for name, w in weights_of(trainer).items()))
    return worst, rates


def adamw(
    weight: Tensor, gradient: Tensor, m: Tensor, v: Tensor, step: int, lr: float, settings: OptimizerSettings
) -> Tensor:
    """Algorithm 2 of arXiv 1711.05101; vectors (norms, biases) are not decayed, as is the custom."""
    m.mul_(settings.beta1).add_((1 - settings.beta1) * gradient)
    v.mul_(settings.beta2).add_((1 - settings.beta2) * gradient**2)
    first, second = m / (1 - settings.beta1**step), v / (1 - settings.beta2**step)
    decay = settings.weight_decay if weight.dim() > 1 else 0.0
    return weight - lr * (first / (second.sqrt() + settings.eps) + decay * weight)


def step_without_signal(model: str, samples: str, layout: dict[str, Any]) -> dict[str, float]:
    """After a real one, so that moments and weight decay would move the weights."""
    trainer = Trainer(model, layout, optimizer=SETTINGS)
    trainer.step(read_samples(samples))
    before, steps = weights_of(trainer), trainer.schedule.num_steps
    idle = [replace(s, teacher_prompt_ids=None, group_advantage=0.0) for s in read_samples(samples)]
    _, metrics = trainer.step(idle, 1)
    moved = max(float((w - before[name]).abs().max()) for name, w in weights_of(trainer).items())
    return {
        "moved": moved,
        "scheduled": trainer.schedule.num_steps - steps,
        "steps": metrics["optim/steps"],
        "norm": metrics["optim/grad_norm"],
    }


def not_finite(model: str, samples: str, layout: dict[str, Any], where: str, rank: int) -> list[Any]:
    """(what every rank raises, whether the weights are as before), where rank `rank` has a NaN in loss or gradient."""
    trainer = Trainer(model, layout)
    before = weights_of(trainer)
    if trainer.parallel.rank == rank and where == "loss":
        trainer.learner.head = replace(trainer.learner.head, temperature=math.nan)
    if trainer.parallel.rank == rank and where == "gradient":
        parameter = next(iter(trainer.chunks[0].parameters()))
        parameter.register_hook(lambda gradient: gradient * math.nan)
    if trainer.parallel.rank == rank and where == "gradient norm":  # its square is beyond float32
        parameter = next(iter(trainer.chunks[0].parameters()))
        parameter.register_hook(lambda gradient: gradient + 1e25)
    try:
        trainer.step(read_samples(samples), 7)
    except RunFailed as error:
        return [str(error), all(w.equal(before[name]) for name, w in weights_of(trainer).items())]
    return ["", False]


def refused_teacher(model: str, samples: str, layout: dict[str, Any]) -> list[Any]:
    """(what every rank raises, what rank 0 knew of each token and of the student's reach before the step, whether the
    weights are as before), where any teacher counts as worse."""
    examination.LEAST, examination.LARGEST_LOSS = 1, -math.inf
    microbatch_loss.UNREACHED = 5e-4
    trainer = Trainer(model, layout, optimizer={"mini_batches": 2})
    before, known, reaches = weights_of(trainer), [], []
    examiner = examination.TeacherExaminer(every=5, refuse_worse=True, raises_unsampled=False, decode=str)
    examine = examiner.examine
    examiner.examine = lambda found, reach: [
        known.extend(found),
        reaches.append(reach),
        examine(found, reach),
    ][-1]  # type: ignore[method-assign]
    run: Any = SimpleNamespace(
        parallel=trainer.parallel,
        teacher=trainer.teacher,
        learner=trainer.learner,
        examiner=examiner,
        chat=SimpleNamespace(stop_token_ids=[]),
        rollout=RolloutSettings(group_size=4),
    )
    run.examine_teacher = lambda *step: Run.examine_teacher(run, *step)
    taught = [replace(s, demonstration_id=(s.id + 1) % 4) for s in read_samples(samples)]
    batch = trainer.learner.begin(taught)
    assert trainer.teacher is not None
    teaching = trainer.teacher.teach(batch.mini_batches[0].own_samples, batch.ragged)
    try:
        Run.learn(run, 0, batch, batch.mini_batches[0], teaching)
    except TeacherRefused as error:
        gains = [[round(gain, 4) for gain in one.gains_T] for one in known]
        gains += [[round(share, 4) for reach in reaches for share in reach.shares.values()]]
        return [str(error), gains, all(w.equal(before[name]) for name, w in weights_of(trainer).items())]
    return ["", [], False]
