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


def expect(directory: Path, samples: list[Any], loss: str = "sdpo") -> Expected:
    return plain_step(directory, samples, loss=loss, temperature=0.7, low=0.2, high=0.28)


def learn(
    directory: Path, samples: Path, out: Path, layout: dict[str, Any], **options: Any
) -> tuple[dict[str, Any], list[dict[str, Tensor]]]:
    """Rank 0's result, and for each optimizer step the gradients of all stages."""
    ranks = layout.get("tp", 1) * layout.get("pp", 1) * layout.get("dp", 1)
    args = (str(directory), str(samples), str(out), layout, options)
    results = run_ranks(ranks, "tests.distributed.learning:learn", *args)
    for key in ("scored", "student", "teacher", "advantages", "metrics"):
        assert all(result[key] == results[0][key] for result in results), f"ranks differ in {key}"
    steps: list[dict[str, Tensor]] = []
    for file in sorted(out.glob("*.safetensors"), key=lambda f: int(f.stem.split("-")[1])):
        stage = load_file(file)
        n = int(file.stem.split("-")[1])
        if n == len(steps):
            steps.append({})
        assert not steps[n].keys() & stage.keys()
        steps[n].update(stage)
    return results[0], steps


def compare(result: dict[str, Any], gradients: dict[str, Tensor], expected: Expected) -> None:
    assert result["metrics"]["loss"] == pytest.approx(expected.loss, rel=1e-5)
    flat = [x for row in expected.student for x in row]
    for own, wanted in zip(result["teacher"], expected.teacher, strict=True):
        assert own == pytest.approx(wanted, abs=LOGPROB_TOLERANCE)
    compare_trained(result, expected, "student")
    assert result["scored"] == pytest.approx(flat, abs=LOGPROB_TOLERANCE)
    compare_gradients(gradients, expected.gradients)


def compare_trained(result: dict[str, Any], expected: Expected, key: str) -> None:
    """Log-probabilities under `key`, and advantages, of the responses that were learned from."""
    assert [row is not None for row in result[key]] == expected.trained
    assert 0 < sum(expected.trained) < len(expected.trained) or all(expected.trained)
    for sample, trained in enumerate(expected.trained):
        if trained:
            assert result[key][sample] == pytest.approx(expected.student[sample], abs=LOGPROB_TOLERANCE)
            wanted = expected.advantages[sample]
            assert result["advantages"][sample] == pytest.approx(wanted, abs=2 * LOGPROB_TOLERANCE)


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
    "layout", [{}, {"tp": 3, "pp": 2, "sequence_parallel": True}], ids=["one process", "tp=3 pp=2"]
)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_other_families(
    family: str, layout: dict[str, Any], model: Callable[..., Path], samples: Path, tmp_path: Path
) -> None:
    result, gradients = learn(model(family), samples, tmp_path / "out", layout)
    compare(result, gradients[0], expect(model(family), make_samples()))


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


def test_grpo(model: Callable[..., Path], samples: Path, tmp_path: Path) -> None:
    result, gradients = learn(model(), samples, tmp_path / "out", {"dp": 2}, loss="grpo")
    compare(result, gradients[0], expect(model(), make_samples(), loss="grpo"))


def test_mini_batches_each_have_their_own_mean(
    model: Callable[..., Path], samples: Path, expected: Expected, tmp_path: Path
) -> None:
    """The first step's gradient is that of the first half alone; advantages are of the policy before any step."""
    result, gradients = learn(model(), samples, tmp_path / "out", {"dp": 2}, mini_batches=2)
    assert len(gradients) == 2 and result["metrics"]["optim/steps"] == 2
    compare_gradients(gradients[0], expect(model(), make_samples()[:8]).gradients)
    compare_trained(result, expected, "old")
