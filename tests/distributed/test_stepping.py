"""Optimizer steps: AdamW with warm-up, schedule, clipping and decay in every layout; and the steps that must not be."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.stepping import SETTINGS
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

LAYOUTS = {"one process": {}, "dp=2": {"dp": 2}, "tp=3 pp=2": {"tp": 3, "pp": 2}}


def step(what: str, layout: dict[str, Any], *args: Any) -> list[Any]:
    ranks = layout.get("tp", 1) * layout.get("pp", 1) * layout.get("dp", 1)
    model, samples, *rest = args
    return run_ranks(ranks, f"tests.distributed.stepping:{what}", str(model), str(samples), layout, *rest)


def rates(schedule: str) -> list[float]:
    """Two steps of warm-up, and the first of eight that decay."""
    lr, low = SETTINGS["lr"], SETTINGS["min_lr"]
    done = [1 / 8, 2 / 8]
    after = {
        "constant": [lr, lr],
        "linear": [low + (lr - low) * (1 - d) for d in done],
        "cosine": [low + (lr - low) * (1 + math.cos(math.pi * d)) / 2 for d in done],
    }
    return [lr / 2, lr, *after[schedule]]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_steps_are_adamws(layout: dict[str, Any], model: Callable[..., Path], samples: Path) -> None:
    for distance, found in step("distance_from_adamw", layout, model(), samples, "linear"):
        assert found == pytest.approx(rates("linear"))
        assert distance < 1e-6


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_other_schedules(schedule: str, model: Callable[..., Path], samples: Path) -> None:
    ((distance, found),) = step("distance_from_adamw", {}, model("qwen2"), samples, schedule)
    assert found == pytest.approx(rates(schedule)) and distance < 1e-6


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_without_signal_nothing_moves(
    layout: dict[str, Any], model: Callable[..., Path], samples: Path
) -> None:
    for found in step("step_without_signal", layout, model(), samples):
        assert found == {"moved": 0.0, "scheduled": 0, "steps": 0.0, "norm": 0.0}


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize(("layout", "rank"), [({"dp": 2}, 1), ({"pp": 2}, 1)], ids=["dp=2", "pp=2"])
def test_what_is_not_finite_stops_all_ranks_before_the_step(
    where: str, layout: dict[str, Any], rank: int, model: Callable[..., Path], samples: Path
) -> None:
    for message, as_before in step("not_finite", layout, model(), samples, where, rank):
        assert message.startswith(f"The {where} is nan at step 7 on rank {rank}: the run stops") and as_before


@pytest.mark.parametrize("layout", [{}, {"dp": 2}, {"pp": 2}], ids=["one process", "dp=2", "pp=2"])
def test_a_norm_that_is_not_finite_stops_all_ranks(
    layout: dict[str, Any], model: Callable[..., Path], samples: Path
) -> None:
    for message, _ in step("not_finite", layout, model(), samples, "gradient norm", 0):
        assert message.startswith("The gradient norm is inf at step 7 on rank 0: the run stops")


def test_a_worse_teacher_is_refused_on_all_ranks_before_the_step(
    model: Callable[..., Path], samples: Path
) -> None:
    by_layout = [
        step("refused_teacher", layout, model(), samples) for layout in ({}, {"dp": 2}, {"pp": 2}, {"tp": 3})
    ]
    (message, gains, _), *_ = by_layout[0]
    # the first of two mini-batches: two problems, three responses each with a teacher
    assert message.startswith("worse_teacher: judged by 2 right and ") and len(gains) == 6 + 1
    assert all(0.01 < share < 0.99 for share in gains[-1]), "what the student does not reach"
    for ranks in by_layout:
        assert [(found, as_before) for found, _, as_before in ranks] == [(message, True)] * len(ranks)
        for found, wanted in zip(ranks[0][1], gains, strict=True):
            assert found == pytest.approx(wanted, abs=1e-3)
