"""The weight sets and what works on them, from settings and Hugging Face directories."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdpo_megatron.algorithm.losses import build_terms
from sdpo_megatron.algorithm.losses.base import LossSettings
from sdpo_megatron.config import OptimizerSettings, ParallelSettings, TeacherSettings
from sdpo_megatron.models.shape import ModelShape
from sdpo_megatron.trainer.checkpoint import TrainerState
from sdpo_megatron.trainer.hf_weights import load_hf_weights
from sdpo_megatron.trainer.manifest import Reference, read_reference
from sdpo_megatron.trainer.model import build_model
from sdpo_megatron.trainer.optimizer import build_optimizer, wrap_for_data_parallelism
from sdpo_megatron.trainer.parallel import ParallelState
from sdpo_megatron.trainer.score import Head, Packer, Scorer
from sdpo_megatron.trainer.step import Learner
from sdpo_megatron.trainer.teacher import Teacher, VisitingWeights
from sdpo_megatron.trainer.weight_average import WeightAverage

NEVER_CHANGING = ("frozen", "trust_region")
"""Names of the teachers whose own weights stay as they are in their directory."""


@dataclass(frozen=True)
class HfModel:
    """A Hugging Face directory and what its config.json says."""

    directory: Path
    shape: ModelShape
    key: str = "model.path"
    """The setting that named it."""

    def load(self, dtype: torch.dtype, parallel: ParallelState) -> list[nn.Module]:
        chunks = build_model(self.shape, dtype, parallel)
        load_hf_weights(chunks, self.directory, self.shape, parallel, self.key)
        return chunks


@dataclass(frozen=True, kw_only=True)
class Learning:
    """What a trainer that learns needs to know besides the model."""

    loss: LossSettings
    optimizer: OptimizerSettings
    teacher: TeacherSettings
    teacher_model: HfModel | None
    """The model whose weights teach; None where the loss has no teacher."""
    group_size: int
    steps: int
    """Training steps of the whole run, over which the learning rate is scheduled."""


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """The policy, and what scores and trains it."""

    parallel: ParallelState
    shape: ModelShape
    policy: list[nn.Module]
    scorer: Scorer
    """Scores the policy at temperature 1: for evaluation and canary."""
    teacher: Teacher | None
    learner: Learner | None
    """The learner; None in a trainer that only evaluates."""

    @property
    def state(self) -> TrainerState:
        """What a checkpoint holds. A teacher that is an average lies with the optimizer, one that never changes in its
        own directory, and one that is the policy needs nothing."""
        assert self.learner is not None
        return TrainerState(
            policy=self.policy, optimizer=self.learner.optimizer, schedule=self.learner.schedule
        )

    def refresh_teacher(self) -> None:
        """Brings a teacher that follows other weights up to them. Must be called after a checkpoint was loaded, which
        does not hold such a teacher's weights."""
        if self.teacher is not None:
            self.teacher.show_average()


def build_trainer(
    model: HfModel,
    parallel: ParallelState,
    *,
    dtype: torch.dtype,
    layout: ParallelSettings,
    temperature: float,
    learning: Learning | None,
) -> Trainer:
    """Builds the trainer and loads the policy's weights, and the teacher's. `temperature` is the one that responses are
    sampled at.

    Without `learning` the trainer can only score: it has neither optimizer nor teacher."""
    policy = model.load(dtype, parallel)
    sampled, plain = [
        Head(model.shape, parallel, temperature=t, chunk_tokens=layout.logits_chunk_tokens)
        for t in (temperature, 1.0)
    ]
    packer = Packer(
        parallel, micro_batch_tokens=layout.micro_batch_tokens, share_prefixes=layout.share_prefixes
    )
    teacher = learner = None
    if learning is not None:
        policy = wrap_for_data_parallelism(policy)
        updates = learning.steps * learning.optimizer.mini_batches
        optimizer, schedule = build_optimizer(policy, learning.optimizer, updates, parallel)
        teacher = _build_teacher(learning, policy, optimizer, packer, parallel, dtype)
        learner = Learner(
            policy,
            optimizer,
            schedule,
            sampled,
            packer,
            parallel,
            terms=build_terms(learning.loss),
            group_size=learning.group_size,
            mini_batches=learning.optimizer.mini_batches,
            # they are of other weights soon, and cannot be made again
            states_place="host"
            if learning.teacher.keep_hidden == "recompute"
            else learning.teacher.keep_hidden,
        )
    return Trainer(
        parallel=parallel,
        shape=model.shape,
        policy=policy,
        scorer=Scorer(policy, plain, packer, parallel),
        teacher=teacher,
        learner=learner,
    )


def _build_teacher(
    learning: Learning,
    policy: list[nn.Module],
    optimizer: Any,
    packer: Packer,
    parallel: ParallelState,
    dtype: torch.dtype,
) -> Teacher | None:
    settings = learning.teacher
    if learning.teacher_model is None:
        return None
    own = average = None
    if settings.name != "live":
        chunks = learning.teacher_model.load(dtype, parallel)
        for chunk in chunks:
            chunk.requires_grad_(False).eval()
        offload = settings.offload and parallel.device.type == "cuda"
        own = VisitingWeights(chunks, parallel.device, offload)
    if settings.name == "ema":
        average = WeightAverage(optimizer, policy, parallel)
    return Teacher(settings, own=own, policy=policy, average=average, packer=packer, parallel=parallel)


def reference_of(
    learning: Learning, parallel: ParallelState, announce: Callable[[str], None]
) -> Reference | None:
    """Returns the weights that only teach and never change, None where no teacher has such. `announce` is told in one
    line where this takes long."""
    if learning.teacher_model is None or learning.teacher.name not in NEVER_CHANGING:
        return None
    return read_reference(learning.teacher_model.directory, parallel, announce)
