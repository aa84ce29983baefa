import math

import pytest
import torch
from torch import Tensor

from sdpo_megatron.algorithm.learning_metrics import learning_metrics
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
    return learning_metrics(
        *(SAMPLES, seen(**values), weights_T, taught_T, rollout_T, torch.zeros(8)),
        loss=build_terms(settings)[0].loss,
        group_size=2,
    )


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
    nothing = learning_metrics(
        *(
            SAMPLES,
            seen() | {"computed": torch.zeros(8), "loss": torch.zeros(8)},
            torch.zeros(8),
            torch.ones(8),
            torch.zeros(8),
            torch.zeros(8),
        ),
        loss=build_terms(loss_settings())[0].loss,
        group_size=2,
    )
    said = {key for key, value in nothing.items() if value != 0}
    assert said == {"perf/response_tokens"} and nothing["loss"] == nothing["signal/group_fraction"] == 0
    assert not any(key.startswith(("policy/", "sdpo/", "rollout_gap/")) for key in nothing)


def test_no_right_response_has_no_mean():
    taught_T = torch.tensor([0.0, 0, 1, 0, 0, 0, 0, 0])  # the wrong one
    assert "sdpo/advantage_right" not in metrics(taught_T=taught_T)
    assert "sdpo/advantage_wrong" in metrics(taught_T=taught_T)


def test_grpo_says_nothing_of_a_teacher():
    assert not any(key.startswith("sdpo/") for key in metrics(loss_settings("grpo")))
