"""Loss, gradients and log-probabilities of a learning step: every layout against plain transformers in float64."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.distributed.conftest import make_samples
from tests.distributed.plain import Expected, plain_step
from tests.loss_settings import loss_settings
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

LAYOUTS = {
    "one process": {},
    "pp=2": {"pp": 2},
    "dp=2": {"dp": 2},
    "tp=3": {"tp": 3},
    "tp=3 with sequence parallelism": {"tp": 3, "sequence_parallel": True},
    "tp=3 pp=2": {"tp": 3, "pp": 2},
    "tp=3 dp=2 with sequence parallelism": {"tp": 3, "dp": 2, "sequence_parallel": True},
}
LOGPROB_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 2e-5
"""Of the largest entry of the tensor, in float32 against float64."""


TOKEN = {"name": "token", "rollout_is_cap": None}
MINI_BATCHED: list[dict[str, Any]] = [
    {"name": "token"},
    {"name": "divergence", "is_clip": 1.05},
    {"name": "clipped_divergence", "top_k": 30},
]
OBJECTIVES: dict[str, dict[str, Any]] = {
    "reverse KL": {"alpha": 1.0, "rollout_is_cap": 2.0},
    "forward KL": {"alpha": 0.0},
    "JSD": {"alpha": 0.5},
    "top-K with tail": {"alpha": 1.0, "top_k": 20},
    "top-K of the teacher, renormalised, JSD": {
        "alpha": 0.3, "top_k": 20, "top_k_rest": "renormalise", "top_k_support": "teacher"
    },
    "sequence": {"name": "sequence"},
    "RLSD": {"name": "rlsd"},
}  # fmt: skip


def expect(
    directory: Path,
    samples: list[Any],
    *,
    weights: dict[str, Tensor] | None = None,
    old: list[list[float]] | None = None,
    **loss: Any,
) -> Expected:
    settings = loss_settings(**{**TOKEN, **loss})
    return plain_step(directory, samples, settings=settings, temperature=0.7, weights=weights, old=old)


def learn(
    directory: Path, samples: Path, out: Path, layout: dict[str, Any], **options: Any
) -> tuple[dict[str, Any], list[dict[str, Tensor]]]:
    """Rank 0's result, and for each optimizer step the gradients of all stages."""
    ranks = layout.get("tp", 1) * layout.get("pp", 1) * layout.get("dp", 1)
    args = (str(directory), str(samples), str(out), layout, options)
    results = run_ranks(ranks, "tests.distributed.learning:learn", *args)
    for key in ("scored", "metrics"):
        assert all(result[key] == results[0][key] for result in results), f"ranks differ in {key}"
    return results[0], read_gradients(out)


def read_gradients(out: Path) -> list[dict[str, Tensor]]:
    steps: list[dict[str, Tensor]] = []
    for file in sorted(out.glob("[0-9]*.safetensors"), key=lambda f: int(f.stem.split("-")[1])):
        stage = load_file(file)
        n = int(file.stem.split("-")[1])
        if n == len(steps):
            steps.append({})
        assert not steps[n].keys() & stage.keys()
        steps[n].update(stage)
    return steps


def compare(
    result: dict[str, Any], gradients: dict[str, Tensor], expected: Expected, *, has_teacher: bool = True
) -> None:
    assert result["metrics"]["loss"] == pytest.approx(expected.loss, rel=1e-5)
    flat = [x for row in expected.student for x in row]
    compare_trained(result, expected, "student", has_teacher)
    assert result["scored"] == pytest.approx(flat, abs=LOGPROB_TOLERANCE)
    compare_gradients(gradients, expected.gradients)


def compare_trained(result: dict[str, Any], expected: Expected, key: str, has_teacher: bool) -> None:
    """Log-probabilities under `key`, the teacher's, and advantages, of the tokens that were learned from."""
    none = [[0.0] * len(row) for row in expected.teacher]
    named = [
        (key, expected.student),
        ("advantages", expected.advantages),
        ("teacher", expected.teacher if has_teacher else none),
    ]
    for sample, weights_T in enumerate(expected.weights):
        for name, wanted in named:
            row = result[name][sample]
            assert (row is not None) == any(weights_T), (name, sample)
            for t, weight in enumerate(weights_T):
                value = None if row is None or not weight else wanted[sample][t]
                assert row is None or row[t] == pytest.approx(value, abs=2 * LOGPROB_TOLERANCE), (
                    name,
                    sample,
                    t,
                )


def compare_gradients(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert gradients.keys() == expected.keys()
    for name, wanted in expected.items():
        difference = (gradients[name].double() - wanted).abs().max()
        assert difference <= GRADIENT_TOLERANCE * wanted.abs().max(), f"{name}: {difference}"


@pytest.fixture(scope="module")
def expected(model: Callable[..., Path]) -> Expected:
    return expect(model(), make_samples())


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_llama_in_every_layout(
    layout: dict[str, Any], model: Callable[..., Path], samples: Path, expected: Expected, tmp_path: Path
) -> None:
    result, gradients = learn(model(), samples, tmp_path / "out", layout)
    compare(result, gradients[0], expected)
    norm = torch.stack([g.norm() for g in expected.gradients.values()]).norm()
    assert result["metrics"]["optim/grad_norm"] == pytest.approx(float(norm), rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"share_prefixes": False},
        {"micro_batch_tokens": 1},
        {"micro_batch_tokens": 10_000},
        {"micro_batch_tokens": 10_000, "share_prefixes": False, "chunk_tokens": 10_000},
    ],
    ids=["prefixes apart", "a micro-batch each", "one micro-batch", "one micro-batch apart"],
)
@pytest.mark.parametrize("layout", [{}, {"dp": 2}], ids=["one process", "dp=2"])
def test_cutting_into_micro_batches_changes_nothing(
    layout: dict[str, Any],
    options: dict[str, Any],
    model: Callable[..., Path],
    samples: Path,
    expected: Expected,
    tmp_path: Path,
) -> None:
    result, gradients = learn(model(), samples, tmp_path / "out", layout, **options)
    compare(result, gradients[0], expected)


@pytest.mark.parametrize(
    "layout", [{}, {"tp": 3, "pp": 2, "sequence_parallel": True}], ids=["one process", "tp=3 pp=2"]
)
@pytest.mark.parametrize("loss", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_every_objective(
    loss: dict[str, Any], layout: dict[str, Any], model: Callable[..., Path], samples: Path, tmp_path: Path
) -> None:
    loss = {"name": "divergence", **loss}
    result, gradients = learn(model(), samples, tmp_path / "out", layout, loss=loss)
    compare(result, gradients[0], expect(model(), make_samples(), **loss))


def test_grpo(model: Callable[..., Path], samples: Path, tmp_path: Path) -> None:
    result, gradients = learn(model(), samples, tmp_path / "out", {"dp": 2}, loss={"name": "grpo"})
    compare(result, gradients[0], expect(model(), make_samples(), name="grpo"), has_teacher=False)


@pytest.mark.parametrize("loss", MINI_BATCHED, ids=[loss["name"] for loss in MINI_BATCHED])
def test_mini_batches_each_have_their_own_mean(
    loss: dict[str, Any], model: Callable[..., Path], samples: Path, tmp_path: Path
) -> None:
    """Each step's gradient is that of its half alone; the second's with the ratio against the policy before the first,
    and the teacher as it was."""
    loss = {"rollout_is_cap": 2.0, **loss}
    result, gradients = learn(model(), samples, tmp_path / "out", {"dp": 2}, mini_batches=2, loss=loss)
    assert len(gradients) == 2 and result["metrics"]["optim/steps"] == 2
    batch = make_samples()
    before = expect(model(), batch, **loss)
    compare_gradients(gradients[0], expect(model(), batch[:8], **loss).gradients)
    for own, wanted in zip(result["old"], before.student, strict=True):
        for value, known in zip(own or [], wanted, strict=False):
            assert value is None or value == pytest.approx(known, abs=2 * LOGPROB_TOLERANCE)
    weights = load_file(tmp_path / "out" / "weights-1.safetensors")
    later = expect(model(), batch[8:], weights=weights, old=before.student[8:], **loss)
    compare_gradients(gradients[1], later.gradients)
    pairs = zip(later.student, before.student[8:], strict=True)
    moved = max(abs(a - b) for now, then in pairs for a, b in zip(now, then, strict=True))
    assert moved > 0.05


@pytest.mark.parametrize("layout", [{"dp": 2}, {"pp": 2}], ids=str)
@pytest.mark.parametrize("keep", ["host", "recompute"])
def test_wherever_hidden_states_wait_the_numbers_are_the_same(
    keep: str, layout: dict[str, int], model: Callable[..., Path], samples: Path, tmp_path: Path
) -> None:
    """With mixed teachers; on the host with an objective that also keeps the states of the policy before its first
    step, recomputed with several micro-batches."""
    options: dict[str, Any] = {"mini_batches": 2, "loss": {"name": "clipped_divergence"}}
    if keep == "recompute":
        options = {"micro_batch_tokens": 15}
    found = [
        learn(
            *(model(), samples, tmp_path / place, layout),
            teacher={"name": "trust_region", "trust_region_mix": 0.5, "keep_hidden": place},
            **options,
        )
        for place in ("device", keep)
    ]
    (on_device, wanted), (elsewhere, gradients) = found
    for key in ("student", "teacher", "divergence"):
        for row, other in zip(on_device[key], elsewhere[key], strict=True):
            assert (row is None) == (other is None)
            assert [x for x in row or [] if x is not None] == pytest.approx(
                [x for x in other or [] if x is not None], abs=1e-5
            ), key
    for step, other, tolerance in zip(wanted, gradients, (GRADIENT_TOLERANCE, 1e-4), strict=False):
        for name, gradient in step.items():
            difference = (other[name] - gradient).abs().max()
            assert difference <= tolerance * gradient.abs().max(), f"{name}: {difference}"
