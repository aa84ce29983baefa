import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sdpo_megatron.algorithm.learning_metrics import OwnTokens, WholeStep, learning_metrics
from sdpo_megatron.algorithm.losses import build_terms
from sdpo_megatron.algorithm.losses.base import LossSettings
from sdpo_megatron.records import Sample
from tests.loss_settings import loss_settings


def sample(id: int, length: int, success: bool) -> Sample:
    return Sample(
        id=id,
        prompt_ids=[1],
        response_ids_T=[2] * length,
        rollout_logprobs_T=[-1.0] * length,
        loss_mask_T=[1] * length,
        teacher_prompt_ids=[1, 1],
        teacher_tokens=length,
        success=success,
        group_advantage=0.0,
    )


SAMPLES = [sample(0, 2, True), sample(1, 1, False), sample(2, 3, False), sample(3, 2, False)]
"""Two groups of two; nothing is learned from the second."""
WEIGHTS_T = torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0])


def seen(**values: Tensor) -> dict[str, Tensor]:
    names = (
        "student",
        "teacher",
        "advantage",
        "divergence",
        "entropy",
        "mass",
        "loss",
        "ratio",
        "clipped",
        "correction",
    )
    filled = {name: torch.full((8,), 99.0) * (WEIGHTS_T == 0) for name in names}
    return filled | {"computed": WEIGHTS_T.clone()} | {
        name: torch.cat([value, torch.full((5,), 0.0 if name == "loss" else 99.0)]) for name, value in values.items()
    }  # fmt: skip


def metrics(
    settings: LossSettings = loss_settings(),  # noqa: B008  it is frozen
    /,
    *,
    weights_T: Tensor = WEIGHTS_T,
    taught_T: Tensor = torch.ones(8),  # noqa: B008
    rollout_T: Tensor = torch.zeros(8),  # noqa: B008
    **values: Tensor,
) -> dict[str, float]:
    return found_by(seen(**values), weights_T, taught_T, rollout_T, settings)


def found_by(
    seen: dict[str, Tensor],
    weights_T: Tensor,
    taught_T: Tensor = torch.ones(8),  # noqa: B008
    rollout_T: Tensor = torch.zeros(8),  # noqa: B008
    settings: LossSettings = loss_settings(),  # noqa: B008
    samples: list[Sample] = SAMPLES,
) -> dict[str, float]:
    own = OwnTokens(
        samples=samples,
        seen=seen,
        weights_B=weights_T,
        teacher_mask_B=taught_T,
        rollout_logprobs_B=rollout_T,
        old_logprobs_B=torch.zeros(len(weights_T)),
    )
    whole = WholeStep(weight=float(weights_T.sum()), tokens=len(weights_T), groups=2)
    loss = build_terms(settings)[0].loss
    alone: Any = SimpleNamespace(owned_total=lambda values_T: values_T, largest=lambda value: value)
    return learning_metrics(own, whole, loss=loss, group_size=2, everyone=alone)


def gap(student_T: Tensor, rollout_T: Tensor, weights_T: Tensor, lengths: list[int]) -> dict[str, float]:
    """What is reported of the gap to the server, under the names without their beginning."""
    names = ("student", "teacher", "advantage", "divergence", "entropy", "mass", "loss")
    nothing = {name: torch.zeros(len(weights_T)) for name in (*names, "ratio", "clipped", "correction")}
    samples = [sample(k, length, True) for k, length in enumerate(lengths)]
    found = found_by(
        nothing | {"computed": torch.ones(len(weights_T))},
        *(weights_T, torch.ones(len(weights_T)), rollout_T - student_T),
        samples=samples,
    )
    return {
        key.removeprefix("rollout_gap/"): value
        for key, value in found.items()
        if key.startswith("rollout_gap/")
    }


def test_means_are_over_trained_tokens():
    found = metrics(entropy=torch.tensor([1.0, 2.0, 6.0]), clipped=torch.tensor([0.0, 0.0, 1.0]))
    assert found["policy/entropy"] == pytest.approx(3.0)
    assert found["policy/clip_fraction"] == pytest.approx(1 / 3)
    assert found["perf/trained_tokens"] == 3 and found["perf/response_tokens"] == 8


def test_tokens_without_a_gradient_count_as_divisor_of_the_loss_only():
    weights_T = torch.tensor([1.0, 1, 1, 0, 0, 1, 1, 1])  # the last three were not computed
    found = metrics(
        weights_T=weights_T, loss=torch.tensor([1.0, 2.0, 6.0]), entropy=torch.tensor([1.0, 2.0, 6.0])
    )
    assert found["loss"] == pytest.approx(1.5) and found["policy/entropy"] == pytest.approx(3.0)
    assert found["perf/trained_tokens"] == 3


def test_the_teachers_means_are_over_taught_tokens():
    taught_T = torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 0])
    found = metrics(
        taught_T=taught_T, advantage=torch.tensor([1.0, 3.0, 50.0]), divergence=torch.tensor([2.0, 4.0, 50.0])
    )
    assert found["sdpo/mean_advantage"] == pytest.approx(2.0)
    assert found["sdpo/divergence/mean"] == pytest.approx(3.0) and found["sdpo/divergence/p99"] < 4.1


def test_the_gap_is_the_trainers_minus_the_servers():
    found = metrics(rollout_T=torch.full((8,), -1.0))  # the trainer says 0
    assert found["rollout_gap/kl_k3"] == pytest.approx(math.e - 2.0)


def test_the_teacher_on_right_and_wrong_responses():
    found = metrics(student=torch.tensor([-1.0, -1.0, -1.0]), teacher=torch.tensor([-0.5, -1.0, -3.0]))
    assert found["sdpo/advantage_right"] == pytest.approx(0.25)
    assert found["sdpo/advantage_wrong"] == pytest.approx(-2.0)


def test_percentiles_of_the_divergence():
    found = metrics(divergence=torch.tensor([0.0, 1.0, 5.0]))
    assert found["sdpo/divergence/mean"] == pytest.approx(2.0)
    assert found["sdpo/divergence/p50"] == 1.0 and found["sdpo/divergence/p99"] == pytest.approx(4.92)
    assert found["sdpo/divergence/p95"] == pytest.approx(4.6)
    assert "sdpo/divergence/mean" not in metrics(loss_settings("token"))


def test_mass_and_tail_of_the_likeliest_tokens():
    found = metrics(loss_settings(top_k=5), mass=torch.tensor([0.9, 0.8, 0.7]))
    assert found["sdpo/top_k_mass"] == pytest.approx(0.8) and found["sdpo/tail_mass"] == pytest.approx(0.2)
    assert "sdpo/top_k_mass" not in metrics()


def test_signal():
    found = metrics()
    assert found["signal/group_fraction"] == 0.5 and found["signal/token_fraction"] == 3 / 8


def test_nothing_learned():
    nothing = found_by(seen() | {"computed": torch.zeros(8), "loss": torch.zeros(8)}, torch.zeros(8))
    said = {key for key, value in nothing.items() if value != 0}
    assert said == {"perf/response_tokens"} and nothing["loss"] == nothing["signal/group_fraction"] == 0
    assert not any(key.startswith(("policy/", "sdpo/", "rollout_gap/")) for key in nothing)


def test_no_right_response_has_no_mean():
    taught_T = torch.tensor([0.0, 0, 1, 0, 0, 0, 0, 0])  # the wrong one
    assert "sdpo/advantage_right" not in metrics(taught_T=taught_T)
    assert "sdpo/advantage_wrong" in metrics(taught_T=taught_T)


def test_grpo_says_nothing_of_a_teacher():
    assert not any(key.startswith("sdpo/") for key in metrics(loss_settings("grpo")))


def test_the_rollout_gap_is_over_trained_tokens():
    student_T, rollout_T = torch.tensor([-1.0, -2.0, 5.0]), torch.tensor([-1.5, -1.0, 0.0])
    found = gap(student_T, rollout_T, torch.tensor([1.0, 1.0, 0.0]), [1, 2])
    assert found["mean"] == pytest.approx(0.75)
    assert found["max"] == pytest.approx(1.0)
    assert found["kl_k3"] == pytest.approx((math.exp(0.5) - 1.5 + math.exp(-1) - 0) / 2)
    assert gap(student_T, rollout_T, torch.zeros(3), [3]) == {}


def test_the_rollout_gap_by_depth_in_the_response():
    """Two responses of 20 and 130 tokens; the second has a gap from its 129th token on."""
    gap_T = torch.zeros(150)
    gap_T[20 + 128 :] = 0.5
    gap_T[3] = 0.36
    found = gap(gap_T, torch.zeros(150), torch.ones(150), [20, 130])
    by_depth = {key: value for key, value in found.items() if "depth" in key}
    assert by_depth == {"depth_0": pytest.approx(0.36 / 32), "depth_16": 0.0, "depth_128": 0.5}


def test_k3_estimates_the_divergence_of_the_server_from_the_trainer():
    server, trainer = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
    tokens = torch.multinomial(server, 20_000, True, generator=torch.Generator().manual_seed(0))
    found = gap(trainer.log()[tokens], server.log()[tokens], torch.ones(len(tokens)), [len(tokens)])
    assert found["kl_k3"] == pytest.approx((server * (server / trainer).log()).sum().item(), rel=0.05)
