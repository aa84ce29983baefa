"""The losses of `tools/bench_kernels.py` at the shape of the first table in `tools/README.md`, measured beside its
estimates: ours, eager PyTorch, torch.compile, Megatron's cross entropy and Liger's.

`of the estimate` is the measured time over the estimated one, a lower bound of this kind of GPU."""

from collections.abc import Iterator
from functools import partial

import torch

from tools.bench_kernels import (
    BYTES_PER_S,
    IMPLEMENTATIONS,
    Implementation,
    Shape,
    eager_kl,
    eager_logprob,
    measure,
    reverse_kl,
    row,
    token_level,
)
from tools.gpu_check.machine import Machine, Row, attempt, lacks

TABLE = Shape(tokens=8192, vocab=151_936, tp=8, hidden=4096, chunk=1024, dtype="bfloat16")
SMALL = Shape(tokens=8, vocab=1_024, tp=1, hidden=32, chunk=4, dtype="float32")


def run(machine: Machine) -> Iterator[Row]:
    shape = machine.pick(TABLE, SMALL)
    for name, of in {**IMPLEMENTATIONS, **compiled(machine)}.items():
        if name.startswith("Liger") and not machine.is_gpu:
            yield {"what": name, "skipped": "needs a GPU"}
        elif name.startswith("Liger") and (missing := lacks("liger_kernel")):
            yield {"what": name, "skipped": missing}
        else:
            yield from attempt(name, lambda name=name, of=of: beside_estimate(machine, shape, name, of))
        machine.release()


def compiled(machine: Machine) -> dict[str, Implementation]:
    """Returns what PyTorch's compiler makes of the eager losses; on a CPU they are only traced, because that takes
    seconds where compiling takes minutes."""
    how = {"backend": machine.pick("inductor", "eager"), "dynamic": False}
    return {
        "torch.compile: token level": Implementation(
            partial(token_level, torch.compile(eager_logprob, **how)), "", {}
        ),
        "torch.compile: reverse KL": Implementation(
            partial(reverse_kl, torch.compile(eager_kl, **how)), "", {}
        ),
    }


def beside_estimate(machine: Machine, shape: Shape, name: str, of: Implementation) -> Row:
    found: Row = dict(measure(of, shape, machine.pick(5, 1)))
    if not machine.is_gpu:
        return {"s": found["wall s"]}
    gpu = next((gpu for gpu in BYTES_PER_S if gpu in torch.cuda.get_device_name(machine.device)), None)
    if name in IMPLEMENTATIONS and gpu is not None:
        expected = row(name, shape, runs=0)
        estimate = expected[f"{gpu} ms (estimate)"]
        found |= {"estimated ms": estimate, "of the estimate": found["ms"] / estimate}
        found["estimated extra GB"] = expected["extra GB (estimate)"]
    return found
