"""What ranks run: a trainer without server and rollouts, on samples that were written down."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from sdpo_megatron.algorithm.batching import student_views
from sdpo_megatron.algorithm.losses import build_terms
from sdpo_megatron.config import OptimizerSettings, ParallelSettings, TeacherSettings
from sdpo_megatron.models.shape import read_model_shape
from sdpo_megatron.records import Sample
from sdpo_megatron.trainer.batch import Batch
from sdpo_megatron.trainer.build import HfModel, Learning, build_trainer
from sdpo_megatron.trainer.hf_weights import stream_hf_weights
from sdpo_megatron.trainer.parallel import ParallelState, initialize
from sdpo_megatron.trainer.ragged import Ragged
from tests.gathered import by_sample, flat
from tests.loss_settings import loss_settings

GROUP_SIZE = 4
TEMPERATURE = 0.7


def read_samples(path: str) -> list[Sample]:
    return [Sample(**values) for values in json.loads(Path(path).read_text())]


class Trainer:
    """Policy, reference, optimizer and learner in a layout."""

    def __init__(
        self,
        directory: str,
        layout: dict[str, Any],
        *,
        reference: str | None = None,
        share_prefixes: bool = True,
        micro_batch_tokens: int = 100,
        mini_batches: int = 1,
        chunk_tokens: int = 7,
        loss: dict[str, Any] | None = None,
        teacher: dict[str, Any] | None = None,
        optimizer: dict[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
        parallel: ParallelState | None = None,
    ):
        """`reference`: the directory of the reference's weights, by default the policy's."""
        self.parallel = parallel or initialize(ParallelSettings(**layout), device=torch.device("cpu"), seed=1)
        model = HfModel(Path(directory), read_model_shape(Path(directory)))
        self.reference_directory = Path(reference or directory)
        settings = loss_settings(**{"name": "token", "rollout_is_cap": None, **(loss or {})})
        self.terms = build_terms(settings)
        has_teacher = self.terms[0].loss.teacher_views > 0
        built = build_trainer(
            model,
            self.parallel,
            dtype=dtype,
            layout=ParallelSettings(
                micro_batch_tokens=micro_batch_tokens,
                share_prefixes=share_prefixes,
                logits_chunk_tokens=chunk_tokens,
            ),
            temperature=TEMPERATURE,
            learning=Learning(
                loss=settings,
                optimizer=OptimizerSettings(
                    **{"lr": 1e-2, "warmup_steps": 0, "mini_batches": mini_batches, **(optimizer or {})}
                ),
                teacher=TeacherSettings(**(teacher or {})),
                teacher_model=HfModel(self.reference_directory, model.shape) if has_teacher else None,
                group_size=GROUP_SIZE,
                steps=10,
            ),
        )
        assert built.learner is not None
        self.shape, self.chunks, self.teacher = built.shape, built.policy, built.teacher
        self.learner, self.state = built.learner, built.state
        self.optimizer, self.schedule = self.learner.optimizer, self.learner.schedule
        # at the sampling temperature
        self.policy = replace(built.scorer, head=self.learner.head)

    def step(self, samples: Sequence[Sample], step: int = 0) -> tuple[Batch, dict[str, float]]:
        batch = self.learner.begin(samples)
        for mini_batch in batch.mini_batches:
            teaching = None
            if self.teacher is not None:
                teaching = self.teacher.teach(mini_batch.own_samples, batch.ragged)
            self.learner.learn(batch, mini_batch, teaching, step)
            if self.teacher is not None:
                self.teacher.update_after("optimizer_step")
        if self.teacher is not None:
            self.teacher.update_after("batch")
        return batch, self.learner.metrics(batch)

    def keep_gradients(self, out: Path | None = None) -> list[dict[str, Tensor]]:
        """A list to which every later optimizer step adds this stage's gradient, by Hugging Face name. The weights that
        the n-th gradient is of go to `out`/weights-N.safetensors, where there is one stage."""
        kept: list[dict[str, Tensor]] = []
        step = self.optimizer.step
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)

        def stepping() -> Any:
            named = dict(stream_hf_weights(self.chunks, self.shape, self.parallel))
            if out is not None and self.parallel.leads_stage and self.parallel.pp == 1:
                contiguous = {name: tensor.contiguous() for name, tensor in named.items()}
                save_file(contiguous, out / f"weights-{len(kept)}.safetensors")
            kept.append(gradients(self.chunks, self.shape, self.parallel))
            return step()

        self.optimizer.step = stepping
        return kept


@torch.no_grad()
def gradients(chunks: list[nn.Module], shape: Any, parallel: ParallelState) -> dict[str, Tensor]:
    """main_grad of all data-parallel shards, sent through the weights' own way to Hugging Face names."""
    for buffer in chunks[0].buffers:  # type: ignore[union-attr]
        for bucket in buffer.buckets:  # type: ignore[union-attr]
            own = bucket.grad_data.chunk(parallel.dp)[parallel.dp_rank].clone()
            dist.all_gather_into_tensor(bucket.grad_data, own, group=parallel.groups.dp_cp)
    (model,) = chunks
    weights = [parameter.data.clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.data.copy_(parameter.main_grad)  # type: ignore[attr-defined]
    named = {name: tensor.clone() for name, tensor in stream_hf_weights(chunks, shape, parallel)}
    for parameter, weight in zip(model.parameters(), weights, strict=True):
        parameter.data.copy_(weight)
    return named


def learn(
    directory: str,
    samples: str,
    out: str,
    layout: dict[str, Any],
    options: dict[str, Any],
    parallel: ParallelState | None = None,
) -> dict[str, Any]:
    """One learning step. Gradients of the n-th optimizer step go to `out`/STAGE-n.safetensors."""
    trainer = Trainer(directory, layout, parallel=parallel, **options)
    kept = trainer.keep_gradients(Path(out))
    batch = read_samples(samples)
    before = trainer.policy.logprobs(student_views(batch), Ragged([len(s.response_ids_T) for s in batch]))
    learned, metrics = trainer.step(batch)
    if trainer.parallel.leads_stage:
        Path(out).mkdir(parents=True, exist_ok=True)
        for n, named in enumerate(kept):
            tensors = {name: tensor.contiguous() for name, tensor in named.items()}
            save_file(tensors, Path(out) / f"{trainer.parallel.pp_rank}-{n}.safetensors")
    seen = flat(learned, trainer.parallel, batch)
    names = {"advantages": "advantage"} | {name: name for name in ("student", "old", "teacher", "divergence")}
    return {
        "scored": before.tolist(),
        **{key: by_sample(seen, name, batch) for key, name in names.items()},
        "metrics": metrics,
    }
