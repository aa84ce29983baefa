"""Every objective and kernel against its definition in float64 on the same device, value and gradient.

Logits lie in buffers that are NaN everywhere else, results in buffers filled with a canary: what is read or written
beyond a tensor's end shows. Each row gives the largest error relative to its bound.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from sdpo_megatron.kernels.divergence import divergence_definition
from sdpo_megatron.kernels.objective import FullVocabulary, Objective, TokenLevel, TopK
from sdpo_megatron.kernels.rows import LogitRows
from sdpo_megatron.kernels.top_k import top_k_definition
from sdpo_megatron.kernels.vocab import VocabShard
from tools.gpu_check.machine import Machine, Row, attempt
from tools.gpu_check.shards import on_every_shard

K = 20
OBJECTIVES: dict[str, Any] = {
    "token level": TokenLevel(),
    "forward KL": FullVocabulary(0.0),
    "JSD 0.3": FullVocabulary(0.3),
    "reverse KL": FullVocabulary(1.0),
    "top 20, tail": TopK(1.0, K, "tail", "student"),
    "top 20, renormalised": TopK(0.5, K, "renormalise", "teacher"),
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
CANARY = 7.0
CHUNK = 256
"""Rows whose float64 definition is computed at a time: 0.3 GB a tensor at 152k columns."""


@dataclass(frozen=True, kw_only=True)
class Case:
    rows: int
    vocab: int
    padding: int = 0
    """Columns of the last shard beyond the vocabulary, which are NaN."""
    margin: int = 64
    """Elements of NaN beside each row: a multiple of 64 leaves rows aligned."""
    shards: int = 1
    temperature: float = 1.0
    spread: float = 2.0
    offset: float = 0.0
    values: float = 1e-5
    """Bound of errors of log-probabilities, entropies and divergences, relative where they exceed 1."""
    gradients: float = 2e-5
    """Bound of the gradient's error, as a part of its row's largest entry, or of all rows' where `extreme`."""
    extreme: bool = False
    """Most rows are all but one-hot: their gradients are differences of nearly equal numbers."""
    dtypes: tuple[str, ...] = ("bfloat16", "float32")


CASES = {
    "real": Case(rows=8192, vocab=151_936),
    "odd": Case(rows=513, vocab=50_257, padding=47, temperature=0.7),
    "unaligned": Case(rows=37, vocab=1_031, margin=37),
    "three shards": Case(rows=64, vocab=50_257, padding=2, shards=3, temperature=1.3),
    "spread by hundreds": Case(
        rows=64, vocab=32_000, spread=300.0, values=1e-4, gradients=5e-4, extreme=True
    ),
    "far from zero": Case(
        rows=64, vocab=32_000, offset=5e3, values=1e-4, gradients=5e-4, dtypes=("float32",)
    ),
}
SMALL = {"real": Case(rows=6, vocab=8_448), "odd": Case(rows=5, vocab=4_171, padding=5, temperature=0.7)}
"""The cases that the interpreter runs in their place."""


def run(machine: Machine) -> Iterator[Row]:
    for name, case in CASES.items():
        if not machine.is_gpu:
            case = SMALL.get(name, Case(**{**vars(case), "rows": 4, "vocab": min(case.vocab, 1_030)}))
        for dtype in case.dtypes:
            for objective in OBJECTIVES:
                what = f"{objective}, {dtype}, {name}"
                yield from attempt(what, lambda c=case, d=dtype, o=objective: examine(machine, c, d, o))
                machine.release()


class Surrounded:
    """A tensor inside a larger one that is NaN everywhere else."""

    def __init__(self, x_TV: Tensor, margin: int):
        rows, columns = x_TV.shape
        self.margin = margin
        self.buffer = x_TV.new_full((rows + 2, columns + 2 * margin), float("nan"))
        self.inside_TV = self.buffer[1:-1, margin : margin + columns]
        self.inside_TV.copy_(x_TV)

    def untouched(self) -> bool:
        m = self.margin
        outside = (self.buffer[0], self.buffer[-1], self.buffer[:, :m], self.buffer[:, -m:])
        return all(bool(x.isnan().all()) for x in outside)


class Canaries:
    """While it is entered, whatever `torch.empty` gives lies between canaries."""

    def __enter__(self) -> "Canaries":
        self.buffers: list[tuple[Tensor, int]] = []
        plain = torch.empty

        def empty(*size: Any, **options: Any) -> Tensor:
            # no launcher asks so
            if not all(isinstance(n, int) for n in size):
                return plain(*size, **options)
            count = torch.Size(size).numel()
            buffer = plain(count + 128, **options).fill_(CANARY)
            self.buffers.append((buffer, count))
            return buffer[64 : 64 + count].view(size)

        self._patch = mock.patch.object(torch, "empty", empty)
        self._patch.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._patch.stop()

    def untouched(self) -> bool:
        return all(
            bool((buffer[:64] == CANARY).all() and (buffer[64 + count :] == CANARY).all())
            for buffer, count in self.buffers
        )


def examine(machine: Machine, case: Case, dtype: str, objective: str) -> Row:
    torch.manual_seed(sum(map(ord, dtype + objective)))
    no_ties = isinstance(OBJECTIVES[objective], TopK) and not case.extreme
    student_TV, teacher_TV = logits(machine, case, DTYPES[dtype], no_ties)
    # columns of tables, as a micro-batch's are
    target_T = torch.randint(case.vocab, (case.rows, 3), device=machine.device)[:, 1]
    weight_T, slope_T = (torch.rand(case.rows, 2, device=machine.device) - 0.3).unbind(1)
    weight_T[1], slope_T[2] = 0.0, 0.0
    # a row that the gradient's kernel must not read
    weight_T[3] = slope_T[3] = 0.0
    got = compute(OBJECTIVES[objective], case, student_TV, teacher_TV, target_T, weight_T, slope_T)
    # a GPU rounds to bfloat16, the interpreter cuts
    half = 2.0**-8 if machine.is_gpu else 2.0**-7
    rounding = half if dtype == "bfloat16" else 0.0
    worst: dict[str, float] = {}
    for start in range(0, case.rows, CHUNK):
        rows = slice(start, start + CHUNK)
        errors = compare(
            *(OBJECTIVES[objective], case, student_TV[rows], teacher_TV[rows], target_T[rows]),
            *(weight_T[rows], slope_T[rows], {name: x[rows] for name, x in got.items()}, rounding),
        )
        worst = {name: max(error, worst.get(name, 0.0)) for name, error in errors.items()}
    return {**{f"{k} error/bound": v for k, v in worst.items()}, "ok": all(v <= 1 for v in worst.values())}


def logits(machine: Machine, case: Case, dtype: torch.dtype, no_ties: bool) -> tuple[Tensor, Tensor]:
    """Returns the logits of both models [T, V], far from zero on different sides. With `no_ties` K + 1 tokens of each
    row stand out by different amounts: among many logits in bfloat16 the K-th largest would be several."""
    shape = (case.rows, case.vocab)
    student_TV = case.spread * torch.randn(shape, device=machine.device)
    teacher_TV = student_TV + 0.5 * case.spread * torch.randn(shape, device=machine.device)
    if no_ties:
        top_TK = torch.rand(shape, device=machine.device).topk(K + 1, dim=-1).indices
        steps_K = 4.5 * case.spread + 1 + 0.25 * torch.arange(K + 1, device=machine.device)
        student_TV.scatter_(1, top_TK, steps_K.expand(case.rows, -1).contiguous())
        teacher_TV.scatter_(1, top_TK, steps_K.flip(0).expand(case.rows, -1).contiguous())
    offset_T1 = case.offset * torch.ones(case.rows, 1, device=machine.device)
    offset_T1[::2] *= -1.0
    return (student_TV + offset_T1).to(dtype), (teacher_TV - offset_T1).to(dtype)


def compute(
    objective: Objective,
    case: Case,
    student_TV: Tensor,
    teacher_TV: Tensor,
    target_T: Tensor,
    weight_T: Tensor,
    slope_T: Tensor,
) -> dict[str, Tensor]:
    """Returns what the objective says on all shards; nothing outside of tensors may have been touched."""
    columns = -(-(case.vocab + case.padding) // case.shards)

    def on_shard(shard: VocabShard) -> dict[str, Tensor]:
        own = slice(shard.start, min(shard.start + columns, case.vocab))
        padding = columns - (own.stop - own.start)
        student, teacher = (
            Surrounded(torch.nn.functional.pad(x[:, own], (0, padding), value=float("nan")), case.margin)
            for x in (student_TV, teacher_TV)
        )
        with Canaries() as canaries:
            logit_rows = LogitRows(student.inside_TV, teacher.inside_TV, target_T, shard)
            rows = objective.evaluate(logit_rows)
            objective.write_gradient_(logit_rows, rows, weight_T, slope_T)
        if not (student.untouched() and teacher.untouched() and canaries.untouched()):
            raise AssertionError("something beside a tensor was written")
        if not bool((student.inside_TV[:, own.stop - own.start :] == 0).all()):
            raise AssertionError("the gradient of padding columns is not 0")
        assert rows.teacher is not None
        found = {"logprob": rows.student.logprob_U, "entropy": rows.student.entropy_U}
        found |= {"teacher": rows.teacher.logprob_U}
        if rows.divergence_U is not None:
            found["divergence"] = rows.divergence_U
        return found | {"gradient": student.inside_TV[:, : own.stop - own.start]}

    shards = on_every_shard(case.shards, columns, case.vocab, case.temperature, on_shard)
    return shards[0] | {"gradient": torch.cat([shard["gradient"] for shard in shards], dim=1)}


def compare(
    objective: Objective,
    case: Case,
    student_TV: Tensor,
    teacher_TV: Tensor,
    target_T: Tensor,
    weight_T: Tensor,
    slope_T: Tensor,
    got: dict[str, Tensor],
    rounding: float,
) -> dict[str, float]:
    """Returns the errors of some rows, by name, as parts of their bounds."""
    student_TV, teacher_TV = student_TV.double().requires_grad_(), teacher_TV.double()
    log_p_TV = (student_TV / case.temperature).log_softmax(-1)
    log_q_TV = (teacher_TV / case.temperature).log_softmax(-1)
    of_target = target_T[:, None]
    expected = {
        "logprob": log_p_TV.gather(1, of_target)[:, 0],
        "entropy": -(log_p_TV.exp() * log_p_TV).sum(-1),
        "teacher": log_q_TV.gather(1, of_target)[:, 0],
    }
    loss = (slope_T * expected["logprob"]).sum()
    divergence_T = define(objective, student_TV, teacher_TV, case.temperature)
    if divergence_T is not None:
        expected["divergence"] = divergence_T
        loss = loss + (weight_T * divergence_T).sum()
    (gradient_TV,) = torch.autograd.grad(loss, student_TV)
    errors = {name: value_error(got[name], x_T.detach()) / case.values for name, x_T in expected.items()}
    size_TV = gradient_TV.abs()
    largest = size_TV.amax() if case.extreme else size_TV.amax(-1, keepdim=True)
    allowed_TV = (rounding * size_TV + case.gradients * largest).clamp_min(1e-30)
    errors["gradient"] = worst((got["gradient"].double() - gradient_TV).abs() / allowed_TV)
    return errors


def define(objective: Any, student_TV: Tensor, teacher_TV: Tensor, temperature: float) -> Tensor | None:
    if isinstance(objective, FullVocabulary):
        return divergence_definition(student_TV, teacher_TV, alpha=objective.alpha, temperature=temperature)
    if isinstance(objective, TopK):
        return top_k_definition(student_TV, teacher_TV, **vars(objective), temperature=temperature)
    return None


def value_error(got_T: Tensor, expected_T: Tensor) -> float:
    return worst((got_T.double() - expected_T).abs() / expected_T.abs().clamp_min(1.0))


def worst(errors: Tensor) -> float:
    """Returns the largest error, infinite if any is not a number."""
    return float(errors.nan_to_num(nan=float("inf")).max())
