"""Learning: a batch in, changed weights out, one optimizer step per mini-batch."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sdpo_megatron.algorithm.batching import student_views
from sdpo_megatron.config import LossSettings
from sdpo_megatron.errors import RunFailed
from sdpo_megatron.records import Sample
from sdpo_megatron.trainer.batch import Batch, MiniBatch
from sdpo_megatron.trainer.forward import run_microbatches
from sdpo_megatron.trainer.last_stage import LastStage
from sdpo_megatron.trainer.parallel import ParallelState
from sdpo_megatron.trainer.score import Head, Packer, Scorer
from sdpo_megatron.trainer.teacher import Teaching


class Learner:
    """Owns the optimizer; every rank calls its methods together, with the same samples."""

    def __init__(
        self,
        chunks: list[nn.Module],
        optimizer: Any,
        schedule: Any,
        head: Head,
        packer: Packer,
        parallel: ParallelState,
        *,
        loss: LossSettings,
        group_size: int,
        mini_batches: int,
    ):
        self.chunks = chunks
        self.optimizer = optimizer
        self.schedule = schedule
        self.head = head
        self.packer = packer
        self.parallel = parallel
        self.loss = loss
        self.group_size = group_size
        self.mini_batches = mini_batches
        self.policy = Scorer(chunks, head, packer, parallel)
        self.norms: list[float] = []
        """Gradient norms of the present batch's optimizer steps."""

    def begin(self, samples: Sequence[Sample]) -> Batch:
        """The samples cut into mini-batches. With several of them the policy's own log-probabilities are taken down
        before the first changes it."""
        batch = Batch(
            samples, self.packer, loss=self.loss, group_size=self.group_size, mini_batches=self.mini_batches
        )
        if self.mini_batches > 1:
            batch.old_T = self.policy.logprobs(student_views(samples), batch.ragged)
        self.norms = []
        return batch

    def learn(self, batch: Batch, mini_batch: MiniBatch, teaching: Teaching | None, step: int) -> None:
        """One optimizer step, or none where there is nothing to learn.

        Raises:
            RunFailed: where loss, gradient or its norm is not finite; these weights must not be saved. `step` is the
                training step, for that message.
        """
        for chunk in self.chunks:
            chunk.zero_grad_buffer()  # type: ignore[operator]
        self.optimizer.zero_grad()
        at_loss = LastStage(self.head, self.loss, batch, teaching, mini_batch.weight)
        results = run_microbatches(self.chunks, mini_batch.microbatches, at_loss, self.parallel, learn=True)
        self._refuse_non_finite([result["loss"] for result in results], "loss", step)
        self._refuse_non_finite([self._largest_gradient()], "gradient", step)
        if mini_batch.samples:
            self.schedule.step(1)
            _, norm, _ = self.optimizer.step()
            # squares of finite numbers may overflow: clipping by that norm leaves momentum and decay alone to act
            self._refuse_non_finite([float(norm)], "gradient norm", step)
            self.norms.append(float(norm))

    def end(self, batch: Batch) -> dict[str, float]:
        """Every rank then has what all of them saw; the optimizer's metrics."""
        batch.join(self.parallel)
        return {
            "optim/grad_norm": sum(self.norms) / len(self.norms) if self.norms else 0.0,
            "optim/steps": float(len(self.norms)),
            "optim/lr": float(self.optimizer.param_groups[0]["lr"]),
        }

    def _largest_gradient(self) -> float:
        """Of this rank's, in magnitude; NaN if any is."""
        buffers: list[Any] = [b for c in self.chunks for b in [*c.buffers, *c.expert_parallel_buffers]]  # type: ignore[misc]
        return float(torch.stack([buffer.grad_data.abs().max() for buffer in buffers]).max())

    def _refuse_non_finite(self, values: list[float], what: str, step: int) -> None:
        """RunFailed on all ranks, where one of this rank's or another's is not finite."""

        def check() -> None:
            bad = [value for value in values if not math.isfinite(value)]
            if bad:
                raise RunFailed(
                    f"The {what} is {bad[0]} at step {step} on rank {self.parallel.rank}: the run stops; its last "
                    "checkpoint is intact. Lower optimizer.lr or look at rollouts/train for what the policy was "
                    "trained on."
                )

        self.parallel.everywhere(check)
