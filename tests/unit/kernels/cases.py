"""Logits of student and teacher that have broken such kernels, and what runs the kernels on them.

Several shards run one after another in this process (`tools/gpu_check/shards.py`). Real process groups are in
`tests/distributed`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from sdpo_megatron.kernels.divergence import divergence_loss
from sdpo_megatron.kernels.objective import TopK
from sdpo_megatron.kernels.softmax import RowSoftmax, policy_gradient
from sdpo_megatron.kernels.vocab import VocabShard
from tests.unit.kernels import oracles
from tests.unit.kernels.oracles import Array, Expected
from tools.gpu_check import shards

INFINITY, NAN = float("inf"), float("nan")
FLOAT32_VALUE, FLOAT32_GRADIENT, HUGE_GRADIENT = 2e-6, 5e-6, 5e-4


@dataclass(frozen=True, kw_only=True)
class Case:
    student_TV: Tensor
    """All shards' columns side by side, padding included; no kernel may change it or see beyond `vocab_size`."""
    teacher_TV: Tensor
    target_T: Tensor
    weight_T: Tensor
    """d loss / d divergence"""
    slope_T: Tensor
    """d loss / d logprob of the target"""
    vocab_size: int
    active_T: Tensor | None = None
    shards: int = 1
    temperature: float = 1.0
    gradient_bound: float = FLOAT32_GRADIENT
    """Largest error, relative to the largest entry of the gradient."""

    @property
    def columns(self) -> int:
        """Of one shard."""
        return self.student_TV.shape[1] // self.shards

    @property
    def rows(self) -> Tensor:
        """Numbers of the rows that count."""
        active_T = torch.ones_like(self.target_T) if self.active_T is None else self.active_T
        return active_T.nonzero()[:, 0].cpu()

    def exact(self, logits_TV: Tensor) -> Array:
        """The rows and columns that count, in float64."""
        return logits_TV.cpu()[self.rows, : self.vocab_size].double().numpy()

    def to(self, device: str) -> "Case":
        moved = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **moved)


def ordinary(rows: int = 6, vocab_size: int = 530, spread: float = 2.0, seed: int = 0) -> Case:
    """Some rows have no divergence, some no policy gradient, the last of them neither."""
    generator = torch.Generator().manual_seed(seed)
    student_TV = spread * torch.randn(rows, vocab_size, generator=generator)
    teacher_TV = student_TV + 0.5 * spread * torch.randn(rows, vocab_size, generator=generator)
    weight_T, slope_T = torch.rand(2, rows, generator=generator) - 0.3
    if rows > 4:
        weight_T[[1, 4]] = 0.0
        slope_T[[2, 4]] = 0.0
    return Case(
        student_TV=student_TV,
        teacher_TV=teacher_TV,
        target_T=torch.randint(vocab_size, (rows,), generator=generator),
        weight_T=weight_T,
        slope_T=slope_T,
        vocab_size=vocab_size,
    )


def masked(flags: list[int]) -> Case:
    """Nothing of a masked row may be read: its logits are NaN."""
    case, active_T = ordinary(), torch.tensor(flags, dtype=torch.bool)
    logits = [x_TV.masked_fill(~active_T[:, None], NAN) for x_TV in (case.student_TV, case.teacher_TV)]
    return replace(
        case,
        student_TV=logits[0],
        teacher_TV=logits[1],
        weight_T=case.weight_T * active_T,
        slope_T=case.slope_T * active_T,
        active_T=active_T,
    )


def without(case: Case, columns: slice | Tensor, *, teacher: bool = True) -> Case:
    """Minus infinity in these columns; the targets are in others."""
    student_TV, teacher_TV = case.student_TV.clone(), case.teacher_TV.clone()
    student_TV[:, columns] = -INFINITY
    if teacher:
        teacher_TV[:, columns] = -INFINITY
    allowed = torch.isfinite(student_TV[0]).nonzero()[:, 0]
    target_T = allowed[case.target_T % len(allowed)]
    return replace(case, student_TV=student_TV, teacher_TV=teacher_TV, target_T=target_T)


def student_without_some(blocks: bool = True) -> Case:
    """Minus infinity in about a third of the student's columns, and in a row's whole blocks."""
    case = ordinary()
    gone_TV = torch.rand(case.student_TV.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    gone_TV[torch.arange(6), case.target_T] = False
    target_T = case.target_T.clone()
    if blocks:
        gone_TV[3, :512] = True
        gone_TV[3, 520] = False
        target_T[3] = 520
    return replace(case, student_TV=case.student_TV.masked_fill(gone_TV, -INFINITY), target_T=target_T)


def moved(spread: float, offset: float, bound: float = HUGE_GRADIENT) -> Case:
    """The models' logits lie far from zero, on different sides."""
    case = ordinary(spread=spread)
    sign_T1 = torch.tensor([1.0, -1.0] * 3)[:, None]
    return replace(
        case,
        student_TV=case.student_TV + offset * sign_T1,
        teacher_TV=case.teacher_TV - offset * sign_T1,
        gradient_bound=bound,
    )


def peaked() -> Case:
    """One token stands out by 60: for the student alone, for the teacher alone, for both the same, and another."""
    case = ordinary()
    student_TV, teacher_TV = case.student_TV.clone(), case.teacher_TV.clone()
    for row, column in ((0, 3), (2, 400), (3, 529), (5, 500)):
        student_TV[row, column] += 60.0
    for row, column in ((1, 3), (2, 400), (3, 257)):
        teacher_TV[row, column] += 60.0
    return replace(case, student_TV=student_TV, teacher_TV=teacher_TV)


def padded(vocab_size: int, shards: int, columns: int) -> Case:
    """Columns beyond the vocabulary hold garbage, which here is NaN; `columns` are one shard's."""
    case = ordinary(vocab_size=vocab_size)
    garbage_TV = torch.full((len(case.target_T), shards * columns - vocab_size), NAN)
    return replace(
        case,
        student_TV=torch.cat([case.student_TV, garbage_TV], 1),
        teacher_TV=torch.cat([case.teacher_TV, garbage_TV], 1),
        shards=shards,
    )


def in_bfloat16(case: Case, bound: float) -> Case:
    student_TV, teacher_TV = case.student_TV.bfloat16(), case.teacher_TV.bfloat16()
    return replace(case, student_TV=student_TV, teacher_TV=teacher_TV, gradient_bound=bound)


BFLOAT16_GRADIENT = 2**-7
"""Eight binary digits: rounding errs by 2**-8 at most; Triton's interpreter cuts where a GPU rounds, 2**-7."""

CASES: dict[str, Callable[[], Case]] = {
    "ordinary": ordinary,
    "one row": lambda: ordinary(rows=1, vocab_size=1030),
    "fewer columns than a block": lambda: ordinary(vocab_size=41),
    "a multiple of the block": lambda: ordinary(vocab_size=512),
    "temperature 0.7": lambda: replace(ordinary(), temperature=0.7),
    "temperature 1.3, sharded": lambda: replace(ordinary(), temperature=1.3, shards=2),
    "minus infinity in padding": lambda: without(ordinary(), slice(500, None)),
    "minus infinity in a whole shard": lambda: replace(without(ordinary(), slice(265, None)), shards=2),
    "minus infinity in the first shard": lambda: replace(without(ordinary(), slice(0, 265)), shards=2),
    "far from zero": lambda: moved(300.0, 1e4),
    "spread by thousands": lambda: moved(3000.0, 0.0),
    "offset": lambda: moved(2.0, 5000.0),
    "peaked": peaked,
    "peaked, sharded": lambda: replace(peaked(), shards=2),
    "targets in other shards": lambda: replace(ordinary(vocab_size=532), shards=4),
    "garbage beyond the vocabulary": lambda: padded(530, 1, 544),
    "garbage in the last shard": lambda: padded(530, 3, 178),
    "a shard beyond the vocabulary": lambda: padded(300, 3, 150),
    "bfloat16": lambda: in_bfloat16(ordinary(), BFLOAT16_GRADIENT),
    "bfloat16, peaked": lambda: in_bfloat16(peaked(), BFLOAT16_GRADIENT),
}
MASKED: dict[str, Callable[[], Case]] = {
    "masked rows": lambda: masked([1, 1, 0, 1, 0, 1]),
    "masked rows, sharded": lambda: replace(masked([0, 1, 1, 1, 0, 1]), shards=2),
    "all rows masked": lambda: masked([0] * 6),
}


# ------------------------------------------------------------------- shards

Result = TypeVar("Result")


def on_every_shard(case: Case, run: Callable[[slice, VocabShard], Result]) -> list[Result]:
    """`run`(columns, shard) of all ranks; nothing but their all-gathers joins them."""
    return shards.on_every_shard(
        *(case.shards, case.columns, case.vocab_size, case.temperature),
        lambda shard: run(slice(shard.start, shard.start + case.columns), shard),
    )


# ---------------------------------------------------------------- what is run


class Got(NamedTuple):
    loss: Tensor
    logprob_T: Tensor
    entropy_T: Tensor
    teacher_logprob_T: Tensor | None
    divergence_T: Tensor | None
    gradient_TV: Tensor


def run_policy_gradient(case: Case) -> Got:
    def run(columns: slice, shard: VocabShard) -> Got:
        logits_TV, gradients = _learnable(case.student_TV[:, columns])
        loss, _, rows = policy_gradient(
            logits_TV,
            case.target_T,
            lambda logprob_T: ((case.slope_T * logprob_T).sum(), None),
            shard=shard,
            active_T=case.active_T,
        )
        gradient_TV = _backward(loss, logits_TV, gradients)
        _has_read_nothing_masked(rows)
        return Got(loss.detach(), rows.logprob_U, rows.entropy_U, None, None, gradient_TV)

    return _together(on_every_shard(case, run))


def run_divergence(case: Case, alpha: float) -> Got:
    def run(columns: slice, shard: VocabShard) -> Got:
        logits_TV, gradients = _learnable(case.student_TV[:, columns])
        teacher_TV = case.teacher_TV[:, columns].clone()
        loss, _, rows = divergence_loss(
            *(logits_TV, teacher_TV, case.target_T),
            lambda logprob_T, divergence_T, _: (
                (case.weight_T * divergence_T + case.slope_T * logprob_T).sum(),
                None,
            ),
            alpha=alpha,
            shard=shard,
            active_T=case.active_T,
        )
        gradient_TV = _backward(loss, logits_TV, gradients)
        _has_read_nothing_masked(rows.student)
        _has_read_nothing_masked(rows.teacher)
        assert teacher_TV.equal(case.teacher_TV[:, columns]) or teacher_TV.isnan().any()
        numbers = (rows.student.logprob_U, rows.student.entropy_U, rows.teacher.logprob_U, rows.divergence_U)
        return Got(loss.detach(), *numbers, gradient_TV)

    return _together(on_every_shard(case, run))


def run_top_k(case: Case, objective: TopK) -> Got:
    def run(columns: slice, shard: VocabShard) -> Got:
        student_TV, teacher_TV = case.student_TV[:, columns].clone(), case.teacher_TV[:, columns].clone()
        rows = objective.rows(student_TV, teacher_TV, case.target_T, shard)
        assert same_bits(student_TV, case.student_TV[:, columns]), "rows leaves the logits as they were"
        assert same_bits(teacher_TV, case.teacher_TV[:, columns]), "rows leaves the logits as they were"
        loss = (case.weight_T * rows.divergence_U + case.slope_T * rows.student.logprob_U).sum()
        objective.write_gradient_(
            student_TV, teacher_TV, rows, case.target_T, case.weight_T, case.slope_T, shard
        )
        numbers = (rows.student.logprob_U, rows.student.entropy_U, rows.teacher.logprob_U, rows.divergence_U)
        return Got(loss, *numbers, student_TV)

    return _together(on_every_shard(case, run))


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    """NaN and minus infinity included."""
    return ours.contiguous().view(torch.uint8).equal(theirs.contiguous().view(torch.uint8))


def _has_read_nothing_masked(rows: RowSoftmax) -> None:
    assert all(x.isfinite().all() for x in vars(rows).values())


def _learnable(logits_TV: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits as a model gives them, no leaf, and the gradient that will come to them."""
    gradients: list[Tensor] = []
    logits_TV = logits_TV.clone().requires_grad_().clone()
    logits_TV.register_hook(gradients.append)
    return logits_TV, gradients


def _backward(loss: Tensor, logits_TV: Tensor, gradients: list[Tensor]) -> Tensor:
    loss.backward()
    assert gradients[0].data_ptr() == logits_TV.data_ptr(), "the gradient stands where the logits were"
    return gradients[0]


def _together(shards: list[Got]) -> Got:
    for other in shards[1:]:
        for ours, theirs in zip(shards[0][:-1], other[:-1], strict=True):
            assert ours is theirs or (ours is not None and theirs is not None and ours.equal(theirs))
    return shards[0]._replace(gradient_TV=torch.cat([shard.gradient_TV for shard in shards], 1))


# ------------------------------------------------------------- what must hold


def check(case: Case, got: Got, divergence: Expected | None = None, bound: float | None = None) -> None:
    """Values and gradient against float64; rows that do not count have 0 everywhere, and so has padding."""
    student_TV, rows = case.exact(case.student_TV), case.rows
    target_T = case.target_T.cpu()[rows].numpy()
    logprob = oracles.logprob(student_TV, target_T, case.temperature)
    weight_T, slope_T = (x.cpu()[rows].double().numpy() for x in (case.weight_T, case.slope_T))
    gradient_TV, loss = slope_T[:, None] * logprob.gradient_TV, (slope_T * logprob.value_T).sum()
    expected = [
        ("logprob", got.logprob_T, logprob.value_T),
        ("entropy", got.entropy_T, oracles.entropy(student_TV, case.temperature)),
    ]
    if divergence is not None:
        assert got.divergence_T is not None and got.teacher_logprob_T is not None
        gradient_TV = gradient_TV + weight_T[:, None] * divergence.gradient_TV
        loss = loss + (weight_T * divergence.value_T).sum()
        teacher = oracles.logprob(case.exact(case.teacher_TV), target_T, case.temperature)
        expected += [
            ("teacher", got.teacher_logprob_T, teacher.value_T),
            ("divergence", got.divergence_T, divergence.value_T),
        ]
    for name, actual_T, expected_T in expected:
        _close(name, actual_T, expected_T, rows)
    whole_TV = torch.zeros(got.gradient_TV.shape, dtype=torch.float64)
    whole_TV[rows, : case.vocab_size] = torch.from_numpy(gradient_TV)
    error = (got.gradient_TV.cpu().double() - whole_TV).abs().max().item()
    bound = case.gradient_bound if bound is None else bound
    assert error <= bound * whole_TV.abs().max().item(), f"gradient: {error} of {whole_TV.abs().max()}"
    outside_TV = got.gradient_TV.cpu()[:, case.vocab_size :]
    assert not outside_TV.any(), "the gradient by padding is 0"
    assert abs(got.loss.item() - loss) <= 2 * FLOAT32_VALUE * max(1.0, np.abs(loss), len(rows))


def _close(name: str, actual_T: Tensor, expected_T: Array, rows: Tensor) -> None:
    whole_T = torch.zeros(actual_T.shape, dtype=torch.float64)
    whole_T[rows] = torch.from_numpy(expected_T)
    error_T = (actual_T.cpu().double() - whole_T).abs() / whole_T.abs().clamp_min(1.0)
    assert error_T.max() <= FLOAT32_VALUE, f"{name}: {error_T.max()} in {actual_T} for {whole_T}"
