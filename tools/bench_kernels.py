"""Memory traffic, time and memory of the losses at a shape: ours beside PyTorch's, Megatron's and Liger's.

    python tools/bench_kernels.py --tokens 8192 --vocab 151936 --tp 8 --static
    python tools/bench_kernels.py --tokens 512 --vocab 49152 --hidden 576 --dtype float32 [--json FILE]

The Markdown table is of value and gradient. Bytes per logit (of one model, on one rank) are derived from
what is read and written, each operand once per operator or kernel. Milliseconds of an H100, H200 and B200
are an estimate, a lower bound: these bytes over the bandwidth. So is the extra memory with --static. Without
it, memory and time (the least of --runs) are measured, of one rank's share, without collectives, in a process
per implementation: where torch sees a GPU, by CUDA's allocator and events; else resident size, CPU seconds of
all threads and wall seconds, of the plain torch that stands in for our kernels.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import re
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdpo_megatron.files import output_file
from sdpo_megatron.kernels.from_hidden import HiddenPart, loss_from_hidden
from sdpo_megatron.kernels.objective import FullVocabulary, Objective, TokenLevel, TopK
from sdpo_megatron.kernels.rows import LogitRows
from sdpo_megatron.kernels.vocab import VocabShard

BYTES_PER_S = {"H100": 3.35e12, "H200": 4.8e12, "B200": 8.0e12}
RECORDED = ("torch", "triton", "megatron-core", "liger_kernel")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# top tokens; columns of a rank are a multiple of 128 where they do not divide
K, PADDING = 20, 128


@dataclass(frozen=True, kw_only=True)
class Shape:
    tokens: int
    vocab: int
    tp: int
    hidden: int
    chunk: int
    dtype: str

    @property
    def columns(self) -> int:
        padded = -(-self.vocab // (PADDING * self.tp)) * PADDING
        return padded if self.vocab % self.tp else self.vocab // self.tp

    def sizes(self) -> dict[str, float]:
        """Bytes per logit of what is read, written or kept, by the letter that IMPLEMENTATIONS has for it.

        l, f: logits or their like, in their type and in float32. L, F: the same where one is cast to the
        other, no operator if logits are float32. x: hidden states. W: the head's gradient, in float32; P: a
        chunk's share of it, a tensor of its own unless logits are float32. h, H, G: head, W, P, once in each
        chunk. c: a chunk's logits. k: every rank's candidates, gathered and then side by side."""
        b, chunks = DTYPES[self.dtype].itemsize, -(-self.tokens // self.chunk)
        cast, head, chunk = b != 4, self.hidden / self.tokens, min(self.chunk / self.tokens, 1)
        sizes = {"l": b, "f": 4, "L": b * cast, "F": 4 * cast, "x": b * self.hidden / self.columns}
        sizes |= {"W": 4 * head, "P": 4 * head * cast, "h": b * head * chunks, "H": 4 * head * chunks}
        sizes |= {"G": 4 * head * chunks * cast, "c": b * chunk}
        return sizes | {"k": 2 * self.tp * K * (b + 8) / self.columns}


class Inputs:
    """Logits of both models [T, V], or hidden states [T, D] and heads [V, D]."""

    def __init__(self, shape: Shape, device: torch.device, hidden: bool):
        width, heads = (shape.hidden, 2) if hidden else (shape.columns, 0)
        rows = [shape.tokens] * 2 + [shape.columns] * heads
        tensors = [torch.empty(n, width, dtype=DTYPES[shape.dtype], device=device) for n in rows]
        self.student, self.teacher, *self.heads = tensors
        self.target_T = torch.randint(min(shape.columns, shape.vocab), (shape.tokens,), device=device)
        self.slope_T = torch.randn(shape.tokens, device=device)
        self.shard, self.chunk = VocabShard(start=0, vocab_size=shape.vocab), shape.chunk
        self.fill()

    @torch.no_grad()
    def fill(self) -> None:
        # a run leaves gradients in place of logits
        for tensor in (self.student, self.teacher, *self.heads):
            tensor.normal_(std=0.1 if self.heads else 3.0).grad = None


def from_logits(objective: Objective, x: Inputs) -> None:
    with torch.no_grad():
        logits = LogitRows(x.student, x.teacher, x.target_T, x.shard)
        objective.write_gradient_(logits, objective.evaluate(logits), x.slope_T, x.slope_T)


def from_hidden(objective: Objective, x: Inputs) -> None:
    teacher = HiddenPart(1.0, x.teacher, x.heads[1], torch.arange(len(x.teacher), device=x.teacher.device))
    loss_from_hidden(
        x.student.requires_grad_(), x.heads[0].requires_grad_(), [teacher], x.target_T,
        lambda rows, logprob_U, divergence_U, _: (x.slope_T[rows] * (logprob_U + divergence_U)).sum(),
        objective=objective, shard=x.shard, chunk_tokens=x.chunk,
    ).backward()  # fmt: skip


def token_level(logprob: Callable[[Tensor, Tensor], Tensor], x: Inputs) -> None:
    """`logprob` gets logits [T, 1, V] and targets [T, 1]. The teacher's pass, first, leaves nothing."""
    teacher_T1 = logprob(x.teacher[:, None], x.target_T[:, None])
    student_T1 = logprob(x.student.requires_grad_()[:, None], x.target_T[:, None])
    ((student_T1 - teacher_T1).detach() * student_T1).sum().backward()


def eager_logprob(logits_T1V: Tensor, target_T1: Tensor) -> Tensor:
    return logits_T1V.float().log_softmax(-1).gather(-1, target_T1[..., None])[..., 0]


def eager_kl(student_TV: Tensor, teacher_TV: Tensor) -> Tensor:
    log_p_TV = student_TV.float().log_softmax(-1)
    return (log_p_TV.exp() * (log_p_TV - teacher_TV.float().log_softmax(-1))).sum(-1)


def reverse_kl(kl: Callable[[Tensor, Tensor], Tensor], x: Inputs) -> None:
    """`kl` gets both models' logits [T, V]."""
    (x.slope_T * kl(x.student.requires_grad_(), x.teacher)).sum().backward()


def megatron(logits_T1V: Tensor, target_T1: Tensor) -> Tensor:
    from sdpo_megatron.config import ParallelSettings

    # before megatron, which it makes run on a CPU
    from sdpo_megatron.trainer import parallel

    if not torch.distributed.is_initialized():
        store: Any = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group(store=store, rank=0, world_size=1)
        parallel.initialize(ParallelSettings(), device=logits_T1V.device, seed=0)
    return parallel.tensor_parallel.vocab_parallel_cross_entropy(logits_T1V, target_T1)


def liger(logits_T1V: Tensor, target_T1: Tensor) -> Tensor:
    kernels = importlib.import_module("liger_kernel.transformers")
    return kernels.LigerVocabParallelCrossEntropy()(logits_T1V, target_T1)


def liger_jsd(x: Inputs) -> None:
    log_TV = [logits_TV.float().log_softmax(-1) for logits_TV in (x.student.requires_grad_(), x.teacher)]
    importlib.import_module("liger_kernel.transformers").LigerJSD(beta=0.5)(*log_TV).backward()


class Implementation(NamedTuple):
    """A loss to measure. `passes`: 'operator or kernel letters read>letters written | ...', a' a's gradient. `peak`:
    what there is beyond the inputs, at most, and its letters; several, of which the shape says which."""

    run: Callable[[Inputs], None]
    passes: str
    peak: dict[str, str]
    hidden: bool = False


LINEAR = "logits xxhh>ll | {} | hidden' lh>x | head' lx>G | summed GH>H | times incoming xW>xW"
LINEAR_PEAK = {"logits, head', its share, hidden'": "ccWPx"}
SOFTMAX, BACK = "casts LL>FF | log_softmax ff>ff", "log_softmax' ff>f | cast F>L"
EAGER_KL = "exp f>f | minus ff>f | times ff>f | sum f> | times' ff>ff | exp' ff>f | plus ff>f"
MEGATRON = "casts LL>FF | max ff> | minus ff>ff | exp ff>ff | sum ff> | div ff>ff | gradient f>f | cast F>L"
# fmt: off
OURS: dict[str, tuple[Objective, str, dict[str, str]]] = {
    "token level": (TokenLevel(), "sweeps ll> | gradient l>l", {}),
    "reverse KL": (FullVocabulary(1.0), "joint sweep ll> | gradient ll>l", {}),
    "forward KL": (FullVocabulary(0.0), "joint sweep ll> | gradient ll>l", {}),
    "JSD 0.5": (FullVocabulary(0.5), "joint sweep ll> | mixture ll> | gradient ll>l", {}),
    f"top {K}": (TopK(1.0, K, "tail", "student"), "topk l> | sweeps ll> | gradient l>l", {"candidates": "k"}),
}
IMPLEMENTATIONS = {
    **{f"ours: {name}": Implementation(partial(from_logits, objective), passes, peak)
       for name, (objective, passes, peak) in OURS.items()},
    **{f"ours from hidden states: {name}":
       Implementation(partial(from_hidden, objective), LINEAR.format(passes), LINEAR_PEAK, hidden=True)
       for name, (objective, passes, _) in OURS.items()},
    "eager: token level": Implementation(
        partial(token_level, eager_logprob),
        f"{SOFTMAX} | gather' >f | {BACK}", {"log p, 2 gradients": "fff"}),
    "eager: reverse KL": Implementation(
        partial(reverse_kl, eager_kl), f"{SOFTMAX} | {EAGER_KL} | {BACK}", {"log p, p, log p/q, 2 gradients": "fffff"}),
    "Megatron: cross entropy, twice": Implementation(
        partial(token_level, megatron), MEGATRON, {"softmax, logits'": "FL"}),
    "Liger: cross entropy, twice": Implementation(
        partial(token_level, liger), "max ll> | exp ll>ff | gradient f>f | cast F>L", {"exp, logits'": "fL"}),
    "Liger: JSD 0.5 of log_softmax": Implementation(
        liger_jsd, f"{SOFTMAX} | zeros >f | jsd ff>ff | sum f> | {BACK}", {"log p, q, 2 gradients": "ffff"}),
}
# fmt: on


def measure_named(name: str, shape: Shape, runs: int) -> dict[str, float]:
    return measure(IMPLEMENTATIONS[name], shape, runs)


def measure(of: Implementation, shape: Shape, runs: int) -> dict[str, float]:
    """Returns milliseconds on a GPU, else seconds, and memory beyond the inputs; the latter, on a CPU, only in a
    process that has measured nothing else."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    # loads what loads once
    of.run(Inputs(replace(shape, tokens=min(8, shape.tokens)), device, of.hidden))
    x, costs = Inputs(shape, device, of.hidden), []
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    before = torch.cuda.memory_allocated() if on_gpu else pages * resource.getpagesize()
    # the first may compile
    for _ in range(1 + runs):
        x.fill()
        costs.append(cost(of.run, x))
    largest = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    extra = (torch.cuda.max_memory_allocated() if on_gpu else largest) - before
    return {"extra GB": extra / 1e9} | {unit: min(cost[unit] for cost in costs[1:]) for unit in costs[0]}


def cost(run: Callable[[Inputs], None], x: Inputs) -> dict[str, float]:
    if not x.student.is_cuda:
        cpu, wall = time.process_time(), time.perf_counter()
        run(x)
        return {"CPU s": time.process_time() - cpu, "wall s": time.perf_counter() - wall}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run(x)
    end.record()
    torch.cuda.synchronize()
    return {"ms": start.elapsed_time(end)}


def counted(passes: str, sizes: dict[str, float]) -> tuple[float, str]:
    """Returns bytes per logit, and their derivation: 'what read+written, ...'."""
    total, steps = 0.0, []
    for step in passes.split(" | "):
        what, letters = step.rsplit(" ", 1)
        read, written = (sum(sizes[letter] for letter in side) for side in letters.split(">"))
        total += read + written
        steps += [f"{what} {read:.3g}+{written:.3g}"] if read + written else []
    return total, ", ".join(steps)


def row(name: str, shape: Shape, runs: int) -> dict[str, Any]:
    """Returns a line of the table, by column; nothing is measured if `runs` is 0."""
    of, sizes, logits = IMPLEMENTATIONS[name], shape.sizes(), shape.tokens * shape.columns
    traffic, derivation = counted(of.passes, sizes)
    peaks = [(sum(sizes[letter] for letter in letters), what) for what, letters in of.peak.items()]
    kept, what = max(peaks, default=(0.0, "nothing"))
    cells: dict[str, Any] = {"implementation": name, "B/logit": traffic}
    cells |= {f"{gpu} ms (estimate)": 1e3 * traffic * logits / speed for gpu, speed in BYTES_PER_S.items()}
    if name.startswith("Liger") and not importlib.util.find_spec("liger_kernel"):
        cells["implementation"] += " (not installed)"
    # Liger's need a GPU
    elif runs and (torch.cuda.is_available() or not name.startswith("Liger")):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            costs = process.submit(measure_named, name, shape, runs).result()
        cells |= {f"{unit} (measured)": cost for unit, cost in costs.items()}
    cells |= {} if runs else {"extra GB (estimate)": kept * logits / 1e9}
    return cells | {"B/logit read+written": derivation, "extra, B/logit (estimate)": f"{kept:.3g}, {what}"}


def below(shape: Shape, runs: int, machine: str) -> str:
    logits, fits = shape.tokens * shape.columns, "padded to" if shape.vocab % shape.tp else "which is"
    speeds = ", ".join(f"{gpu} {speed / 1e12} TB/s" for gpu, speed in BYTES_PER_S.items())
    size, flop = DTYPES[shape.dtype].itemsize * logits / 1e9, 8e-12 * logits * shape.hidden
    measured = f"Measured (ours: Triton on a GPU, else plain torch): least of {runs} runs, {machine}."
    return f"""
{shape.tokens} tokens, {shape.dtype}, vocabulary of {shape.vocab}, {fits} {shape.tp} x {shape.columns}; logits
of one model on one rank: {size:.3g} GB. From hidden states, D = {shape.hidden} and chunks of {shape.chunk}:
logits and products with their gradient are made too, {flop:.3g} TFLOP that are in no estimate of time, and
which other lines leave to the model. Milliseconds by bandwidth ({speeds})
are an estimate of GPUs, a lower bound. {measured if runs else "So is the extra memory."}"""


def main() -> None:
    shape, options = parse()
    runs = 0 if options.static else options.runs
    rows = [row(name, shape, runs) for name in IMPLEMENTATIONS]
    cpu = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    machine = f"{gpu}, {os.cpu_count()} x {cpu[0] if cpu else 'CPU'}, {torch.get_num_threads()} threads"
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    for cells in rows:
        line = [cells.get(column, "") for column in rows[0]]
        lines.append([cell if isinstance(cell, str) else f"{cell:.4g}" for cell in line])
    print(*(f"| {' | '.join(line)} |" for line in lines), below(shape, runs, machine), sep="\n")
    if options.json:
        versions = {d.name: d.version for d in importlib.metadata.distributions() if d.name in RECORDED}
        found = {"shape": asdict(shape), "machine": machine, "versions": versions, "rows": rows}
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def parse() -> tuple[Shape, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for name, default, text in (
        ("tokens", None, "rows of logits"),
        ("vocab", None, f"tokens of the vocabulary, padded to {PADDING} x tp where tp does not divide it"),
        ("tp", 1, "ranks that share the vocabulary (1)"),
        ("hidden", 4096, "size of hidden states (4096)"),
        ("chunk", 1024, "rows of logits at a time, from hidden states (1024)"),
        ("runs", 3, "measurements, of which the least counts (3)"),
    ):
        parser.add_argument(f"--{name}", type=int, required=default is None, default=default, help=text)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of logits and heads (bfloat16)")
    parser.add_argument("--static", action="store_true", help="measure nothing")
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="to write shape, machine and rows to"
    )
    options = parser.parse_args()
    for name, value in vars(options).items():
        if type(value) is int and value < 1:
            parser.error(f"--{name} is {value}; it must be at least 1")
    return Shape(**{field.name: getattr(options, field.name) for field in fields(Shape)}), options


if __name__ == "__main__":
    main()
