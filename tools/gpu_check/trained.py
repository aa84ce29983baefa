"""A trainer on one rank with random weights: policy, frozen teacher, optimizer, learner."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sdpo_megatron.algorithm.batching import student_views, teacher_views
from sdpo_megatron.algorithm.losses import DEFAULT_LOSS, build_terms
from sdpo_megatron.config import OptimizerSettings, ParallelSettings, TeacherSettings
from sdpo_megatron.models.shape import ModelShape
from sdpo_megatron.models.weight_files import described
from sdpo_megatron.records import Sample
from sdpo_megatron.trainer.hf_weights import load_hf_weights, stream_hf_weights
from sdpo_megatron.trainer.microbatch_loss import MicrobatchLoss
from sdpo_megatron.trainer.model import build_model
from sdpo_megatron.trainer.optimizer import build_optimizer, wrap_for_data_parallelism
from sdpo_megatron.trainer.parallel import ParallelState, initialize
from sdpo_megatron.trainer.score import Head, Packer
from sdpo_megatron.trainer.step import Learner
from sdpo_megatron.trainer.teacher import Teacher, VisitingWeights
from tools.gpu_check.recording import digest, generator
from tools.gpu_check.stopwatch import Stopwatch


def _shape(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, vocab: int) -> ModelShape:
    return ModelShape(
        architecture="LlamaForCausalLM",
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads,
        hidden=hidden,
        ffn=ffn,
        vocab=vocab,
        tie_embeddings=True,
        rope_theta=1e5,
        rope_scaling=None,
        rms_norm_eps=1e-5,
        max_positions=8192,
        eos_ids=(2,),
    )


SHAPES = {
    "tiny": _shape(2, 64, 128, 4, 2, 49_152),
    "SmolLM2": _shape(30, 576, 1536, 9, 3, 49_152),
    "1B": _shape(16, 2048, 8192, 32, 8, 128_256),
}


def start_rank(device: torch.device) -> ParallelState:
    store: Any = torch.distributed.HashStore()  # type: ignore[attr-defined]
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    return initialize(ParallelSettings(), device=device, seed=0)


class Trained:
    def __init__(
        self, shape: ModelShape, dtype: torch.dtype, parallel: ParallelState, *, engine: bool, named: bool
    ):
        """`engine`: layers are Transformer Engine's. `named`: every tensor's weights follow from its name, on any
        machine; else they are drawn on the device, which is faster."""
        self.shape, self.parallel = shape, parallel
        own, taught_by = (build_model(shape, dtype, parallel, transformer_engine=engine) for _ in range(2))
        fill = fill_by_name if named else fill_at_random
        for chunks in (own, taught_by):
            fill(chunks, shape, parallel)
        self.policy = wrap_for_data_parallelism(own)
        optimizer, schedule = build_optimizer(self.policy, OptimizerSettings(warmup_steps=0), 10, parallel)
        head = Head(shape, parallel, temperature=1.0, chunk_tokens=1024)
        packer = Packer(parallel, micro_batch_tokens=8192, share_prefixes=True)
        self.packer = packer
        self.teacher = Teacher(
            TeacherSettings(),
            own=VisitingWeights(
                [chunk.requires_grad_(False).eval() for chunk in taught_by], parallel.device, False
            ),
            policy=self.policy,
            average=None,
            packer=packer,
            parallel=parallel,
        )
        self.learner = Learner(
            *(self.policy, optimizer, schedule, head, packer, parallel),
            terms=build_terms(DEFAULT_LOSS),
            group_size=8,
            mini_batches=1,
        )

    def step(self, samples: Sequence[Sample], watch: Stopwatch) -> Any:
        """Makes one training step, its parts timed, and returns the batch."""
        (model,) = self.policy
        hooks = [
            model.register_forward_pre_hook(lambda *_: watch.start("forward")),
            model.register_forward_hook(lambda *_: watch.stop("forward")),
        ]
        at_loss, optimize = MicrobatchLoss.run, self.learner.optimizer.step

        def timed_loss(*args: Any) -> Any:
            with watch.part("loss"):
                return at_loss(*args)

        def timed_optimizer() -> Any:
            with watch.part("optimizer"):
                return optimize()

        watch.begin_step()
        with mock.patch.object(MicrobatchLoss, "run", timed_loss), watch.part("step"):
            with mock.patch.object(self.learner.optimizer, "step", timed_optimizer):
                with watch.part("pack"):
                    batch = self.learner.begin(samples)
                (mini_batch,) = batch.mini_batches
                with watch.part("teacher"):
                    teaching = self.teacher.teach(mini_batch.own_samples, batch.ragged)
                with watch.part("learn"):
                    self.learner.learn(batch, mini_batch, teaching, 0)
                self.learner.metrics(batch)
        for hook in hooks:
            hook.remove()
        return batch

    def examine(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Returns what `recording.compare` compares, of one step, before the optimizer changes anything."""
        found: dict[str, Any] = {}
        optimize = self.learner.optimizer.step

        def looking() -> Any:
            found["gradients"] = self._gradients()
            return optimize()

        batch = self.learner.begin(samples)
        (mini_batch,) = batch.mini_batches
        teaching = self.teacher.teach(mini_batch.own_samples, batch.ragged)
        with mock.patch.object(self.learner.optimizer, "step", looking):
            self.learner.learn(batch, mini_batch, teaching, 0)
        found["loss"] = float(batch.seen["loss"].sum() / mini_batch.plan.weight)
        return found | {name: batch.seen[name].tolist() for name in ("student", "teacher")}

    def _gradients(self) -> dict[str, list[float]]:
        """Returns the gradients by Hugging Face name, on the weights' own way there."""
        weights = [(parameter, parameter.data) for parameter in self.policy[0].parameters()]
        for parameter, _ in weights:
            parameter.data = parameter.main_grad  # type: ignore[attr-defined]
        named = {
            name: digest(name, x) for name, x in stream_hf_weights(self.policy, self.shape, self.parallel)
        }
        for parameter, data in weights:
            parameter.data = data
        return named

    def operations(self, samples: Sequence[Sample]) -> float:
        """Returns the floating-point operations that a step must do: the teacher's pass once, the student's three
        times."""
        matrices = sum(
            n[0] * n[1] for name, n in described(self.shape) if len(n) == 2 and "embed" not in name
        )
        total = 0.0
        for views, passes in ((student_views(samples), 3), (teacher_views(samples), 1)):
            for microbatch in self.packer(views):
                pairs = int(microbatch.positions_S.sum()) + len(microbatch.ids_S)
                attention = 4 * pairs * self.shape.layers * self.shape.heads * self.shape.head_dim
                head = 2 * len(microbatch.place_H) * self.shape.vocab * self.shape.hidden
                total += passes * (2 * matrices * len(microbatch.ids_S) + attention + head)
        return total


def fill_by_name(chunks: list[nn.Module], shape: ModelShape, parallel: ParallelState) -> None:
    with TemporaryDirectory() as directory:
        tensors = {name: weights_of(name, size) for name, size in described(shape)}
        save_file(tensors, Path(directory) / "model.safetensors")
        del tensors
        load_hf_weights(chunks, Path(directory), shape, parallel)


def weights_of(name: str, size: list[int]) -> Tensor:
    drawn = torch.randn(size, generator=generator(name))
    return 1.0 + 0.1 * drawn if len(size) == 1 else 0.04 * drawn


@torch.no_grad()
def fill_at_random(chunks: list[nn.Module], shape: ModelShape, parallel: ParallelState) -> None:
    torch.manual_seed(2)
    for parameter in chunks[0].parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=0.02)
