"""Learning: a batch in, changed weights out, one optimizer step per mini-batch."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch import nn

from sdpo_megatron.algorithm.batching import student_views
from sdpo_megatron.algorithm.losses.base import Term
from sdpo_megatron.errors import RunFailed
from sdpo_megatron.records import Sample
from sdpo_megatron.trainer.batch import Batch, MiniBatch
from sdpo_megatron.trainer.forward import run_microbatches
from sdpo_megatron.trainer.kept_states import Place, Teaching, keep_states
from sdpo_megatron.trainer.microbatch_loss import loss_at_head
from sdpo_megatron.trainer.parallel import ParallelState
from sdpo_megatron.trainer.plan import Part, plan
from sdpo_megatron.trainer.score import Head, Packer, Scorer


@dataclass
class Learner:
    """Owns the optimizer; every rank calls its methods together."""

    chunks: list[nn.Module]
    optimizer: Any
    schedule: Any
    head: Head
    packer: Packer
    parallel: ParallelState
    _: KW_ONLY
    terms: Sequence[Term]
    group_size: int
    mini_batches: int
    states_place: Place | None = None
    """Where the states of a batch's first policy wait, if the loss asks for them."""
    norms: list[float] = field(default_factory=list, init=False)
    """Gradient norms of the present batch's optimizer steps."""

    def begin(self, samples: Sequence[Sample]) -> Batch:
        """Gives each rank its part of rank 0's samples, which are not looked at elsewhere. With several mini-batches
        the policy's own log-probabilities are recorded before the first changes it."""
        losses = [term.loss for term in self.terms]
        cut = {"dp": self.parallel.dp, "group_size": self.group_size, "mini_batches": self.mini_batches}
        parts = plan(samples, losses, self.packer.by_rank, **cut) if self.parallel.is_main else []
        part = Part.decoded(self.parallel.scatter_bytes([part.encoded() for part in parts]))
        batch = Batch(part, self.packer, losses, samples if parts else (), parts)
        if self.mini_batches > 1:
            microbatches = self.packer.alone(student_views(batch.samples))
            policy = Scorer(self.chunks, self.head, self.packer, self.parallel)
            batch.old_logprobs_B = policy.own_logprobs(microbatches, batch.ragged)
            if any(loss.needs_old_distribution for loss in losses):
                present = [(1.0, nullcontext(self.chunks))]
                batch.old_states = keep_states(
                    *(present, microbatches, batch.ragged, self.parallel),
                    place=self.states_place,
                    copy_head=True,
                )
        self.norms = []
        return batch

    def learn(
        self,
        batch: Batch,
        mini_batch: MiniBatch,
        teaching: Teaching | None,
        step: int,
        before_update: Callable[[], None] = lambda: None,
    ) -> None:
        """Makes one optimizer step, or none where there is nothing to learn. `before_update` is called when what the
        models say of the mini-batch is recorded, and the weights have not changed.

        Raises:
            RunFailed: where loss, gradient or its norm is not finite; these weights must not be saved. `step` is the
                training step, for that message.
        """
        for chunk in self.chunks:
            chunk.zero_grad_buffer()  # type: ignore[operator]
        self.optimizer.zero_grad()
        results = self._accumulate(batch, mini_batch, teaching, step)
        self._refuse_non_finite([result["loss"] for result in results], "loss", step)
        self._refuse_non_finite([self._largest_gradient()], "gradient", step)
        before_update()
        if mini_batch.plan.has_signal:
            self.schedule.step(1)
            _, norm, _ = self.optimizer.step()
            # squares of finite numbers may overflow: clipping by that norm leaves momentum and decay alone to act
            self._refuse_non_finite([float(norm)], "gradient norm", step)
            self.norms.append(float(norm))

    def _accumulate(
        self, batch: Batch, mini_batch: MiniBatch, teaching: Teaching | None, step: int
    ) -> list[dict[str, Any]]:
        """Adds up the mini-batch's gradients. A teacher that keeps nothing passes over as many micro-batches at a time
        as the pipeline has stages, right before the student."""
        microbatches, results = mini_batch.microbatches, []
        window = self.parallel.pp if callable(teaching) else max(len(microbatches), 1)
        for start in range(0, len(microbatches), window):
            some = microbatches[start : start + window]
            ids = {sample_id for microbatch in some for sample_id in microbatch.sample_ids}
            own = [sample for sample in mini_batch.own_samples if sample.id in ids]
            states = teaching(own) if callable(teaching) else teaching
            at_loss = loss_at_head(self.head, self.terms, batch, mini_batch, states, step)
            is_last = start + window >= len(microbatches)
            results += run_microbatches(self.chunks, some, at_loss, self.parallel, learn=True, reduce=is_last)
        return results

    def metrics(self, batch: Batch) -> dict[str, float]:
        """Returns what the batch has to report about learning, on every rank."""
        return batch.metrics(self.terms[0].loss, self.group_size, self.parallel) | {
            "optim/grad_norm": sum(self.norms) / len(self.norms) if self.norms else 0.0,
            "optim/steps": float(len(self.norms)),
            "optim/lr": float(self.optimizer.param_groups[0]["lr"]),
        }

    def _largest_gradient(self) -> float:
        """Returns the largest of this rank's in magnitude; NaN if any is."""
        buffers: list[Any] = [b for c in self.chunks for b in [*c.buffers, *c.expert_parallel_buffers]]  # type: ignore[misc]
        return float(torch.stack([buffer.grad_data.abs().max() for buffer in buffers]).max())

    def _refuse_non_finite(self, values: list[float], what: str, step: int) -> None:
        """Raises RunFailed on all ranks, where one of this rank's values or another's is not finite."""

        def check() -> None:
            bad = [value for value in values if not math.isfinite(value)]
            if bad:
                raise RunFailed(
                    f"The {what} is {bad[0]} at step {step} on rank {self.parallel.rank}: the run stops; its last "
                    f"checkpoint is intact. {self._what_to_do(step)}"
                )

        self.parallel.everywhere(check)

    def _what_to_do(self, step: int) -> str:
        if step == 0 and not self.norms:
            return (
                "No optimizer step was made yet, so it is not the learning rate: the weights of model.path or of the "
                "teacher make numbers that model.dtype cannot hold; set model.dtype=float32, or take another model."
            )
        return "Lower optimizer.lr or look at rollouts/train for what the policy was trained on."
