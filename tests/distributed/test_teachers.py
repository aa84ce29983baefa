"""Frozen, average, trust region and live teachers: what each says, in every layout, and after a resume."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.conftest import make_samples
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

LAYOUTS = {
    "one process": {},
    "dp=2": {"dp": 2},
    "tp=3 pp=2": {"tp": 3, "pp": 2, "sequence_parallel": True},
}
EMA = {"name": "ema", "ema_rate": 0.3}
TEACHERS = [{"name": "frozen"}, EMA, {"name": "trust_region", "trust_region_mix": 0.2}, {"name": "live"}]
OBJECTIVES = [
    {"name": "token"},
    {"name": "sequence"},
    {"name": "divergence", "alpha": 1.0},
    {"name": "divergence", "alpha": 0.0},
    {"name": "divergence", "alpha": 0.5},
    {"name": "divergence", "alpha": 1.0, "top_k": 20},
    {"name": "divergence", "alpha": 0.5, "top_k": 20, "top_k_rest": "renormalise", "top_k_support": "teacher"},
    {"name": "divergence", "alpha": 1.0, "group_advantage_weight": 0.5, "is_clip": 2.0},
]  # fmt: skip


def ranks_of(layout: dict[str, Any]) -> int:
    return layout.get("tp", 1) * layout.get("pp", 1) * layout.get("dp", 1)


def teach(what: str, layout: dict[str, Any], *args: Any, timeout_s: float = 120.0) -> list[Any]:
    function = f"tests.distributed.teaching:{what}"
    model, samples, *rest = args
    return run_ranks(ranks_of(layout), function, str(model), str(samples), layout, *rest, timeout_s=timeout_s)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("cadence", ["batch", "optimizer_step"])
def test_the_average_follows_the_policy(
    cadence: str, layout: dict[str, Any], model: Callable[..., Path], samples: Path
) -> None:
    assert max(teach("average_follows_the_policy", layout, model(), samples, cadence)) < 1e-6


def test_the_average_moves_under_a_bfloat16_policy(model: Callable[..., Path], samples: Path) -> None:
    """By a hundredth of small updates, which bfloat16 could not tell from none."""
    assert min(teach("share_of_weights_whose_average_moved", {"dp": 2}, model(), samples)) > 0.9


def test_the_trust_region_mixes_logits(model: Callable[..., Path], samples: Path) -> None:
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    mix, batch = 0.25, make_samples()
    for layout in ({}, {"tp": 3, "pp": 2}):
        result = teach("mixture", layout, model(), samples, mix)[0]
        networks = []
        for weights in ({}, result["weights"]):
            network = AutoModelForCausalLM.from_pretrained(
                model(), dtype=torch.float64, attn_implementation="eager"
            )
            network.load_state_dict({name: torch.tensor(t) for name, t in weights.items()}, strict=False)
            networks.append(network)
        for sample, row in zip(batch, result["teacher"], strict=True):
            if row is None or sample.teacher_prompt_ids is None:
                continue
            response = sample.response_ids_T[: sample.teacher_tokens]
            ids = torch.tensor([[*sample.teacher_prompt_ids, *response]])
            with torch.no_grad():
                first, second = (n(ids).logits[0, -len(response) - 1 : -1] / 0.7 for n in networks)
            wanted = (
                ((1 - mix) * first + mix * second).log_softmax(-1).gather(1, torch.tensor(response)[:, None])
            )
            for own, value in zip(row, wanted[:, 0].tolist(), strict=False):
                assert own is None or own == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize("layout", [{}, {"pp": 2}], ids=["one process", "pp=2"])
def test_the_live_teacher_is_the_policy_of_the_moment(
    layout: dict[str, Any], model: Callable[..., Path], samples: Path
) -> None:
    assert max(teach("live_teacher_is_the_policy_of_the_moment", layout, model(), samples)) < 1e-5


def test_every_objective_with_every_teacher_in_every_layout(
    model: Callable[..., Path], samples: Path
) -> None:
    """Two steps each; TP, PP and DP only change rounding."""
    directory = model(kv_heads=2)
    results = {}
    for layout in ({}, {"tp": 2}, {"pp": 2}, {"dp": 2}):
        args = (directory, samples, OBJECTIVES, TEACHERS)
        per_rank = teach("every_objective_with_every_teacher", layout, *args, timeout_s=600.0)
        assert all(losses == per_rank[0] for losses in per_rank)
        results[str(layout)] = torch.tensor(per_rank[0])
    wanted = results["{}"]
    for layout, losses in results.items():
        assert torch.allclose(losses, wanted, rtol=2e-3, atol=2e-5), (layout, (losses - wanted).abs().max())
    per_teacher = wanted.view(len(OBJECTIVES), len(TEACHERS), 2)
    assert torch.allclose(
        per_teacher[..., 0], per_teacher[:, :1, 0], atol=1e-5
    )  # all begin with the same weights
    later = per_teacher[..., 1]
    assert (later - later[:, :1]).abs()[:, 1:].min() > 1e-7  # and differ from the frozen one after a step


@pytest.mark.parametrize("layout", [{}, {"dp": 2}], ids=["one process", "dp=2"])
def test_a_resumed_average_equals_one_never_stopped(
    layout: dict[str, Any], model: Callable[..., Path], samples: Path, tmp_path: Path
) -> None:
    def train(layout: dict[str, Any], steps: list[int], **options: Any) -> dict[str, Any]:
        args = (str(model()), str(samples), layout, steps)
        save, load = options.get("save"), options.get("load")
        return run_ranks(
            ranks_of(layout), "tests.distributed.saving:train", *args, save, load, None, "float32", EMA
        )[0]

    store = str(tmp_path / "checkpoints")
    whole = train(layout, [0, 1, 2, 3])
    train(layout, [0, 1], save=store)
    resumed = train(layout, [2, 3], load=store)
    assert resumed["digest"] == whole["digest"] and resumed["metrics"] == whole["metrics"][2:]
    for other in ({}, {"tp": 3}, {"pp": 2}, {"dp": 2}):
        if other != layout:
            moved = train(other, [2, 3], load=store)
            for (metrics, _, teacher), (wanted, _, wanted_teacher) in zip(
                moved["metrics"], whole["metrics"][2:], strict=True
            ):
                assert metrics["loss"] == pytest.approx(wanted["loss"], rel=1e-3)
                assert teacher == pytest.approx(wanted_teacher, abs=1e-3)
