"""The weight sets and what works on them, from a checked configuration."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdpo_megatron.algorithm.losses import build_terms
from sdpo_megatron.config import Config
from sdpo_megatron.models.shape import ModelShape
from sdpo_megatron.preflight.checked import Checked
from sdpo_megatron.trainer.checkpoint import TrainerState
from sdpo_megatron.trainer.hf_weights import load_hf_weights
from sdpo_megatron.trainer.manifest import Reference, read_reference
from sdpo_megatron.trainer.model import build_model
from sdpo_megatron.trainer.optimizer import build_optimizer, wrap_for_data_parallelism
from sdpo_megatron.trainer.parallel import ParallelState
from sdpo_megatron.trainer.score import Head, Packer
from sdpo_megatron.trainer.step import Learner
from sdpo_megatron.trainer.teacher import Teacher, VisitingWeights
from sdpo_megatron.trainer.weight_average import WeightAverage

NEVER_CHANGING = ("frozen", "trust_region")
"""Names of the teachers whose own weights stay as they are in their directory."""


@dataclass(frozen=True)
class Trainer:
    parallel: ParallelState
    shape: ModelShape
    policy: list[nn.Module]
    teacher: Teacher | None
    optimizer: Any
    schedule: Any
    packer: Packer
    sampled: Head
    """The head at the sampling temperature: for learner and teacher."""
    plain: Head
    """The head at temperature 1: for evaluation and canary."""

    @property
    def state(self) -> TrainerState:
        """What a checkpoint holds. A teacher that is an average lies with the optimizer, one that never changes in its
        own directory, and one that is the policy needs nothing."""
        return TrainerState(policy=self.policy, optimizer=self.optimizer, schedule=self.schedule)

    def follow_loaded_weights(self) -> None:
        """To be called after a checkpoint was loaded: what only follows other weights is not in it."""
        if self.teacher is not None:
            self.teacher.show_average()


def build_trainer(checked: Checked, parallel: ParallelState) -> Trainer:
    config, dtype = checked.config, getattr(torch, checked.config.model.dtype)
    policy = wrap_for_data_parallelism(loaded(checked.model_directory, checked.shape, dtype, parallel))
    optimizer, schedule = build_optimizer(
        policy, config.optimizer, config.run.steps * config.optimizer.mini_batches, parallel
    )
    sampled, plain = [
        Head(
            checked.shape, parallel, temperature=temperature, chunk_tokens=config.parallel.logits_chunk_tokens
        )
        for temperature in (config.rollout.temperature, 1.0)
    ]
    packer = Packer(
        parallel,
        micro_batch_tokens=config.parallel.micro_batch_tokens,
        share_prefixes=config.parallel.share_prefixes,
    )
    teacher = build_teacher(checked, policy, optimizer, packer, parallel)
    return Trainer(parallel, checked.shape, policy, teacher, optimizer, schedule, packer, sampled, plain)


def build_teacher(
    checked: Checked, policy: list[nn.Module], optimizer: Any, packer: Packer, parallel: ParallelState
) -> Teacher | None:
    settings, dtype = checked.config.teacher, getattr(torch, checked.config.model.dtype)
    if checked.teacher_shape is None:
        return None
    own = average = None
    if settings.name != "live":
        chunks = loaded(checked.teacher_directory, checked.teacher_shape, dtype, parallel)
        for chunk in chunks:
            chunk.requires_grad_(False).eval()
        offload = settings.offload and parallel.device.type == "cuda"
        own = VisitingWeights(chunks, parallel.device, offload)
    if settings.name == "ema":
        average = WeightAverage(optimizer, policy, parallel)
    return Teacher(settings, own=own, policy=policy, average=average, packer=packer, parallel=parallel)


def reference_of(
    checked: Checked, parallel: ParallelState, announce: Callable[[str], None]
) -> Reference | None:
    """The weights that only teach and never change, None where no teacher has such. `announce` is told in one line
    where this takes long."""
    if checked.teacher_shape is None or checked.config.teacher.name not in NEVER_CHANGING:
        return None
    return read_reference(checked.teacher_directory, parallel, announce)


def loaded(
    directory: Path, shape: ModelShape, dtype: torch.dtype, parallel: ParallelState
) -> list[nn.Module]:
    chunks = build_model(shape, dtype, parallel)
    load_hf_weights(chunks, directory, shape, parallel)
    return chunks


def build_learner(config: Config, trainer: Trainer) -> Learner:
    return Learner(
        trainer.policy,
        trainer.optimizer,
        trainer.schedule,
        trainer.sampled,
        trainer.packer,
        trainer.parallel,
        terms=build_terms(config.loss),
        group_size=config.rollout.group_size,
        mini_batches=config.optimizer.mini_batches,
    )
