"""A training step on one rank: gradients against a CPU's in float32, then time, memory and MFU by part.

Weights are random and made here. The gradients' step is of the rollouts in `recording.json`, which also holds what a
CPU computed in float32 with the weights that every machine makes from their names; the times' step is of long ones.
MFU counts what the model's matrices and its attention must do, over the vendor's dense bfloat16 rate.
"""

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdpo_megatron.files import write_atomically
from sdpo_megatron.models.shape import ModelShape
from sdpo_megatron.records import Sample
from sdpo_megatron.trainer.parallel import ParallelState
from tools.gpu_check.machine import Machine, Row, attempt, lacks
from tools.gpu_check.recording import RECORDING, compare, read
from tools.gpu_check.stopwatch import PARTS, Stopwatch
from tools.gpu_check.trained import SHAPES, Trained, start_rank

DENSE_BFLOAT16 = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
GRADIENT = {torch.float32: 1e-3, torch.bfloat16: 0.15}
"""Bound of the gradient's error relative to its size; a CPU's bfloat16 comes to 0.05 with 30 layers."""


@dataclass(frozen=True)
class Lengths:
    problems: int
    group: int
    prompt: int
    demonstration: int
    response: int

    def samples(self, vocab: int) -> list[Sample]:
        torch.manual_seed(1)

        def tokens(count: int) -> list[int]:
            return torch.randint(vocab, (count,)).tolist()

        samples = []
        for problem in range(self.problems):
            prompt, more = tokens(self.prompt), tokens(self.demonstration)
            for g in range(self.group):
                samples.append(
                    Sample(
                        id=problem * self.group + g,
                        prompt_ids=prompt,
                        response_ids_T=tokens(self.response),
                        rollout_logprobs_T=[-10.0] * self.response,
                        loss_mask_T=[1] * self.response,
                        teacher_prompt_ids=prompt + more,
                        teacher_tokens=self.response,
                        success=g == 0,
                        group_advantage=(g == 0) - 1 / self.group,
                    )
                )
        return samples


LONG = Lengths(problems=4, group=8, prompt=512, demonstration=1024, response=1024)
SHORT = Lengths(problems=1, group=2, prompt=6, demonstration=6, response=8)


def run(machine: Machine) -> Iterator[Row]:
    parallel, recorded = start_rank(machine.device), read()
    no_engine = lacks("transformer_engine") or (None if machine.is_gpu else "needs a GPU")
    work: list[tuple[str, bool, Callable[[], Row]]] = []
    shape = machine.pick("SmolLM2", "tiny")
    for dtype, engine in product((torch.float32, torch.bfloat16), (False, True)):
        what = f"gradients, {shape}-shaped, {name_of(dtype)}, {layers(engine)}"
        work.append((what, engine, partial(gradients, parallel, recorded, shape, dtype, engine)))
    for shape, engine, flash in product(
        machine.pick(("SmolLM2", "1B"), ("tiny",)), (False, True), (True, False)
    ):
        what = f"step, {shape}-shaped, {layers(engine)}, {'flash' if flash else 'no flash'} attention"
        work.append((what, engine, partial(step, machine, SHAPES[shape], parallel, engine, flash)))
    for what, engine, measure in work:
        if engine and no_engine:
            yield {"what": what, "skipped": no_engine}
            continue
        yield from attempt(what, measure)
        gc.collect()
        machine.release()


def layers(engine: bool) -> str:
    return "Transformer Engine" if engine else "megatron-core's layers"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def gradients(
    parallel: ParallelState, recorded: dict[str, Any], shape: str, dtype: torch.dtype, engine: bool
) -> Row:
    trained = Trained(SHAPES[shape], dtype, parallel, engine=engine, named=True)
    errors = compare(trained.examine(recorded["samples"]), recorded["models"][shape])
    return {**errors, "ok": errors["gradient error"] <= GRADIENT[dtype]}


def step(machine: Machine, shape: ModelShape, parallel: ParallelState, engine: bool, flash: bool) -> Row:
    """Returns the medians of three steps in bfloat16, after one that is not counted."""
    trained = Trained(shape, torch.bfloat16, parallel, engine=engine, named=False)
    samples = machine.pick(LONG, SHORT).samples(shape.vocab)
    without_flash = sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
    watch = Stopwatch(machine)
    with nullcontext() if flash else without_flash:
        trained.step(samples, Stopwatch(machine))
        if machine.is_gpu:
            torch.cuda.reset_peak_memory_stats(machine.device)
        for _ in range(machine.pick(3, 1)):
            trained.step(samples, watch)
    seconds = watch.medians()
    found: Row = {f"{part} ms": 1e3 * seconds[part] for part in PARTS}
    found["tokens/s"] = sum(len(sample.response_ids_T) for sample in samples) / seconds["step"]
    done = trained.operations(samples) / seconds["step"]
    found["TFLOP/s"] = done / 1e12
    if machine.is_gpu:
        name = torch.cuda.get_device_name(machine.device)
        rate = next((rate for gpu, rate in DENSE_BFLOAT16.items() if gpu in name), None)
        if rate is not None:
            found["MFU"] = done / rate
        found["peak GB"] = torch.cuda.max_memory_allocated(machine.device) / 1e9
    return found


def record() -> None:
    """Writes what this machine's CPU computes in float32 into `recording.json`, for the rollouts that are in it."""
    parallel = start_rank(torch.device("cpu"))
    recorded = read()
    recorded["models"] = {
        name: Trained(SHAPES[name], torch.float32, parallel, engine=False, named=True).examine(
            recorded["samples"]
        )
        for name in ("tiny", "SmolLM2")
    }
    recorded["samples"] = [vars(sample) for sample in recorded["samples"]]
    write_atomically(RECORDING, json.dumps(recorded) + "\n")
