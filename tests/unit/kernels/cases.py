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

from sdpo_megatron.kernels.objective import FullVocabulary, Objective, TopK
from sdpo_megatron.kernels.rows import LogitRows
from sdpo_megatron.kernels.vocab import VocabShard
from tests.unit.kernels import oracles
from tests.unit.kernels.oracles import Array
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
    shards: int = 1
    temperature: float = 1.0
    gradient_bound: float = FLOAT32_GRADIENT
    """Largest error, relative to the largest entry of the gradient."""

    @property
    def columns(self) -> int:
        """Of one shard."""
        return self.student_TV.shape[1] // self.shards

    def exact(self, logits_TV: Tensor) -> Array:
        """The columns that count, in float64."""
        return logits_TV.cpu()[:, : self.vocab_size].double().numpy()

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
    "garbage one column behind two blocks": lambda: padded(513, 1, 544),
    "garbage in the last shard": lambda: padded(530, 3, 178),
    "a shard beyond the vocabulary": lambda: padded(300, 3, 150),
    "bfloat16": lambda: in_bfloat16(ordinary(), BFLOAT16_GRADIENT),
    "bfloat16, peaked": lambda: in_bfloat16(peaked(), BFLOAT16_GRADIENT),
    "bfloat16, minus infinity in a whole shard": lambda: in_bfloat16(
        CASES["minus infinity in a whole shard"](), BFLOAT16_GRADIENT
    ),
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
    logprob_T: Tensor
    entropy_T: Tensor
    teacher_logprob_T: Tensor
    divergence_T: Tensor | None
    gradient_TV: Tensor


def run(case: Case, objective: Objective) -> Got:
    """The objective's numbers and the gradient by the student's logits of all shards side by side."""

    def on_shard(columns: slice, shard: VocabShard) -> Got:
        student_TV, teacher_TV = case.student_TV[:, columns].clone(), case.teacher_TV[:, columns].clone()
        logits = LogitRows(student_TV, teacher_TV, case.target_T, shard)
        rows = objective.evaluate(logits)
        assert same_bits(student_TV, case.student_TV[:, columns]), "rows leaves the logits as they were"
        objective.write_gradient_(logits, rows, case.weight_T, case.slope_T)
        assert same_bits(teacher_TV, case.teacher_TV[:, columns]), "the teacher's logits stay as they were"
        assert rows.teacher is not None
        softmaxes = (rows.student.logprob_U, rows.student.entropy_U, rows.teacher.logprob_U)
        return Got(*softmaxes, rows.divergence_U, student_TV)

    return _together(on_every_shard(case, on_shard))


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    """NaN and minus infinity included."""
    return ours.contiguous().view(torch.uint8).equal(theirs.contiguous().view(torch.uint8))


def _together(shards: list[Got]) -> Got:
    for other in shards[1:]:
        for ours, theirs in zip(shards[0][:-1], other[:-1], strict=True):
            assert ours is theirs or (ours is not None and theirs is not None and ours.equal(theirs))
    return shards[0]._replace(gradient_TV=torch.cat([shard.gradient_TV for shard in shards], 1))


# ------------------------------------------------------------- what must hold


def check(case: Case, got: Got, objective: Objective) -> None:
    """Values and gradient against float64; padding has 0."""
    student_TV, teacher_TV = case.exact(case.student_TV), case.exact(case.teacher_TV)
    target_T = case.target_T.cpu().numpy()
    logprob = oracles.logprob(student_TV, target_T, case.temperature)
    weight_T, slope_T = (x.cpu().double().numpy() for x in (case.weight_T, case.slope_T))
    gradient_TV = slope_T[:, None] * logprob.gradient_TV
    _close("logprob", got.logprob_T, logprob.value_T)
    _close("entropy", got.entropy_T, oracles.entropy(student_TV, case.temperature))
    _close("teacher", got.teacher_logprob_T, oracles.logprob(teacher_TV, target_T, case.temperature).value_T)
    if isinstance(objective, FullVocabulary | TopK):
        divergence = oracles.of_objective(student_TV, teacher_TV, objective, case.temperature)
        assert got.divergence_T is not None
        _close("divergence", got.divergence_T, divergence.value_T)
        gradient_TV = gradient_TV + weight_T[:, None] * divergence.gradient_TV
    whole_TV = np.zeros(got.gradient_TV.shape)
    whole_TV[:, : case.vocab_size] = gradient_TV
    error = np.abs(got.gradient_TV.cpu().double().numpy() - whole_TV).max()
    assert error <= case.gradient_bound * np.abs(whole_TV).max(), (
        f"gradient: {error} of {np.abs(whole_TV).max()}"
    )
    assert not got.gradient_TV[:, case.vocab_size :].any(), "the gradient by padding is 0"


def holds(case: Case, objective: Objective) -> None:
    check(case, run(case, objective), objective)


def _close(name: str, actual_T: Tensor, expected_T: Array) -> None:
    error_T = np.abs(actual_T.cpu().double().numpy() - expected_T) / np.maximum(np.abs(expected_T), 1.0)
    assert error_T.max() <= FLOAT32_VALUE, f"{name}: {error_T.max()} in {actual_T} for {expected_T}"
