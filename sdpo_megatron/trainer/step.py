"""One step of learning: samples and the teacher's log-probabilities in, changed weights and what happened out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdpo_megatron.algorithm.advantages import sdpo_advantages
from sdpo_megatron.algorithm.batching import Microbatch, split_mini_batches, student_views
from sdpo_megatron.algorithm.losses import clipped_is_loss
from sdpo_megatron.algorithm.metrics import mean_advantage, rollout_gap
from sdpo_megatron.config import LossSettings
from sdpo_megatron.errors import RunFailed
from sdpo_megatron.records import Sample
from sdpo_megatron.trainer.forward import run_microbatches
from sdpo_megatron.trainer.parallel import ParallelState
from sdpo_megatron.trainer.score import Packer, Ragged, Scorer, TokenLogprobs


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Per-token numbers of the whole batch by sample id [sample][T], the same on every rank, and metrics."""

    student_logprobs: list[list[float] | None]
    """None for samples that nothing could be learned from, which were not computed."""
    old_logprobs: list[list[float] | None]
    """Of the policy before this batch's first optimizer step; with one mini-batch the student's own."""
    teacher_logprobs: list[list[float]]
    advantages: list[list[float]]
    metrics: dict[str, float]


@dataclass(frozen=True)
class _Batch:
    """What the loss looks up for each response token of the step, flat in `ragged`'s order, on the CPU."""

    ragged: Ragged
    rollout_T: Tensor
    teacher_T: Tensor
    has_teacher_T: Tensor
    group_advantage_T: Tensor
    weights_T: Tensor
    old_T: Tensor | None

    def weight(self, sample: Sample) -> float:
        """The sum of its tokens' weights."""
        starts = self.ragged.starts
        return float(self.weights_T[starts[sample.id] : starts[sample.id + 1]].sum())


class Learner:
    """Owns the optimizer; every rank calls `step` with the same samples."""

    def __init__(
        self,
        chunks: list[nn.Module],
        optimizer: Any,
        schedule: Any,
        head: TokenLogprobs,
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

    def step(self, samples: Sequence[Sample], teacher_T: Tensor, ragged: Ragged, step: int) -> StepResult:
        """Learns from the samples, one optimizer step per mini-batch.

        Args:
            teacher_T: the teacher's log-probabilities, flat in `ragged`'s order.
            step: the training step, for messages.

        Raises:
            RunFailed: where loss or gradient is not finite; the optimizer has then not stepped on it.
        """
        # with one mini-batch the policy before the first update is the one that learns: no extra pass
        old_T = None
        if self.mini_batches > 1:
            old_T = self.policy.logprobs(student_views(samples), ragged)
        batch = self._batch(samples, teacher_T, ragged, old_T)
        student_T, advantages_T, computed_T = ragged.zeros(), ragged.zeros(), ragged.zeros()
        sums: dict[str, float] = {}
        norms = []
        for part in split_mini_batches(samples, self.group_size, self.mini_batches):
            results = self._optimizer_step(part, batch, step, norms)
            if self.parallel.tp_rank == 0:
                for result in results:
                    computed_T[result["index_T"]] = 1.0
                    student_T[result["index_T"]] = result["student_T"].cpu()
                    advantages_T[result["index_T"]] = result["advantages_T"].cpu()
            for key, value in self._add_up(results).items():
                sums[key] = sums.get(key, 0.0) + value
        student_T, advantages_T, computed_T = map(self.parallel.total, (student_T, advantages_T, computed_T))
        old_T = student_T if old_T is None else old_T
        computed = [bool(row and row[0]) for row in ragged.split(computed_T)]

        def rows(flat_T: Tensor) -> list[list[float] | None]:
            return [row if known else None for row, known in zip(ragged.split(flat_T), computed, strict=True)]

        trained_T = batch.weights_T * computed_T
        return StepResult(
            student_logprobs=rows(student_T),
            old_logprobs=rows(old_T),
            teacher_logprobs=ragged.split(teacher_T),
            advantages=ragged.split(advantages_T),
            metrics=self._metrics(sums, norms, float(batch.weights_T.sum()))
            | {
                "perf/response_tokens": float(len(teacher_T)),
                "perf/trained_tokens": float(trained_T.sum()),
            }
            | (mean_advantage(advantages_T, trained_T) if self.loss.name == "sdpo" else {})
            | rollout_gap(old_T, batch.rollout_T, trained_T),
        )

    def _batch(
        self, samples: Sequence[Sample], teacher_T: Tensor, ragged: Ragged, old_T: Tensor | None
    ) -> _Batch:
        taught = [s.teacher_tokens if s.teacher_prompt_ids is not None else 0 for s in samples]
        has_teacher_T = ragged.flatten(
            [
                [float(t < n) for t in range(len(s.response_ids_T))]
                for s, n in zip(samples, taught, strict=True)
            ]
        )
        weights_T = ragged.flatten([s.loss_mask_T for s in samples])
        if self.loss.name == "sdpo":
            weights_T = weights_T * has_teacher_T
        return _Batch(
            ragged=ragged,
            rollout_T=ragged.flatten([s.rollout_logprobs_T for s in samples]),
            teacher_T=teacher_T,
            has_teacher_T=has_teacher_T,
            group_advantage_T=ragged.spread([s.group_advantage for s in samples]),
            weights_T=weights_T,
            old_T=old_T,
        )

    def _optimizer_step(
        self, part: Sequence[Sample], batch: _Batch, step: int, norms: list[float]
    ) -> list[dict[str, Any]]:
        """Gradient of one mini-batch and, where there is anything to learn in it, an optimizer step.

        Samples whose gradient is zero whatever the model says are not computed; their tokens still count as divisor.
        """
        weight_of = {sample.id: batch.weight(sample) for sample in part}
        total = sum(weight_of.values())
        learns = [sample for sample in part if weight_of[sample.id] > 0 and self._has_signal(sample)]
        for chunk in self.chunks:
            chunk.zero_grad_buffer()  # type: ignore[operator]
        self.optimizer.zero_grad()

        def at_loss(microbatch: Microbatch, hidden_UD: Tensor, head_VD: Tensor):
            return self._loss(microbatch, hidden_UD, head_VD, batch, total)

        microbatches = self.packer(student_views(learns))
        results = run_microbatches(self.chunks, microbatches, at_loss, self.parallel, learn=True)
        self._refuse_non_finite([float(r["sums"]["loss"]) for r in results], "loss", step)
        self._refuse_non_finite([self._largest_gradient()], "gradient", step)
        if learns:
            self.schedule.step(1)
            _, norm, _ = self.optimizer.step()
            norms.append(float(norm))
        return results

    def _largest_gradient(self) -> float:
        """Of this rank's, in magnitude; NaN if any is."""
        largest = [b.grad_data.abs().max() for chunk in self.chunks for b in chunk.buffers]  # type: ignore[union-attr]
        return float(torch.stack(largest).max())

    def _has_signal(self, sample: Sample) -> bool:
        return self.loss.name == "sdpo" or sample.group_advantage != 0

    def _loss(
        self, microbatch: Microbatch, hidden_UD: Tensor, head_VD: Tensor, batch: _Batch, total: float
    ) -> tuple[Tensor, dict[str, Any]]:
        device = self.parallel.device
        index_T = batch.ragged.index_T(microbatch)
        student_T, entropy_U = self.head(microbatch, hidden_UD, head_VD)
        old_T = student_T.detach() if batch.old_T is None else batch.old_T[index_T].to(device)
        if self.loss.name == "sdpo":
            advantages_T = sdpo_advantages(
                batch.teacher_T[index_T].to(device), old_T, batch.has_teacher_T[index_T].to(device)
            )
        else:
            advantages_T = batch.group_advantage_T[index_T].to(device)
        weights_T = batch.weights_T[index_T].to(device)
        loss, sums = clipped_is_loss(
            student_T,
            batch.rollout_T[index_T].to(device),
            advantages_T,
            weights_T,
            self.loss.clip_low,
            self.loss.clip_high,
        )
        sums["entropy"] = (weights_T * entropy_U[microbatch.row_T.to(device)]).sum()
        results = {
            "index_T": index_T,
            "student_T": student_T.detach().float(),
            "advantages_T": advantages_T,
            "sums": sums,
        }
        return loss / max(total, 1.0), results

    def _refuse_non_finite(self, values: list[float], what: str, step: int) -> None:
        """On all ranks together, so that none of them waits for one that has left."""
        bad = [value for value in values if not math.isfinite(value)]
        by_rank = self.parallel.gather(str(bad[0]) if bad else "")
        for rank, value in enumerate(by_rank):
            if value:
                raise RunFailed(
                    f"The {what} is {value} at step {step} on rank {rank}: the run stops; its last checkpoint is "
                    "intact. Lower optimizer.lr or look at rollouts/train for what the policy was trained on."
                )

    def _add_up(self, results: list[dict[str, Any]]) -> dict[str, float]:
        own: dict[str, float] = {}
        if self.parallel.tp_rank == 0:
            for result in results:
                for key, value in result["sums"].items():
                    own[key] = own.get(key, 0.0) + float(value)
        total: dict[str, float] = {}
        for part in self.parallel.gather(own):
            for key, value in part.items():
                total[key] = total.get(key, 0.0) + value
        return total

    def _metrics(self, sums: dict[str, float], norms: list[float], total: float) -> dict[str, float]:
        """`loss` is what was minimised; the policy's are means over the tokens that were computed."""
        weight = max(sums.get("weight", 0.0), 1.0)
        return {
            "loss": sums.get("loss", 0.0) / max(total, 1.0),
            "policy/entropy": sums.get("entropy", 0.0) / max(sums.get("weight", 0.0), 1.0),
            "policy/ratio": sums.get("ratio", 0.0) / weight,
            "policy/clip_fraction": sums.get("clipped", 0.0) / weight,
            "optim/grad_norm": sum(norms) / len(norms) if norms else 0.0,
            "optim/steps": float(len(norms)),
            "optim/lr": float(self.optimizer.param_groups[0]["lr"]),
        }
