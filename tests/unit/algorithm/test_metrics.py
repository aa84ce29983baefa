import math

import pytest
import torch

from sdpo_megatron.algorithm.metrics import (
    environment_metrics,
    group_metrics,
    mean_advantage,
    quantiles,
    rollout_gap,
)
from sdpo_megatron.records import FinishReason, Grade, Group, Message, Problem, Rollout

PROBLEM = Problem(id="p", messages=[Message(role="user", content="?")])


def rollout(tokens: int, finish_reason: FinishReason = "stop") -> Rollout:
    return Rollout(
        prompt_ids=[1],
        response_ids_T=[0] * tokens,
        rollout_logprobs_T=[0.0] * tokens,
        loss_mask_T=[1] * tokens,
        weight_spans=[],
        finish_reason=finish_reason,
        text="",
    )


GROUPS = [
    Group(
        problem=PROBLEM,
        rollouts_G=[rollout(2), rollout(4, "length")],
        grades_G=[Grade(reward=1.0), Grade(reward=0.2, correct_format=False)],
    ),
    Group(
        problem=PROBLEM,
        rollouts_G=[rollout(6), rollout(8, "thinking")],
        grades_G=[Grade(reward=0.0), Grade(reward=0.4)],
    ),
]


def test_environment_metrics():
    assert environment_metrics(GROUPS, 0.5) == pytest.approx(
        {
            "env/all/correct": 0.25,
            "env/all/reward/total": 0.4,
            "env/all/format_fraction": 0.75,
            "env/all/truncated_fraction": 0.25,
            "env/all/unfinished_thought_fraction": 0.25,
            "env/all/response_length/mean": 5.0,
            "env/all/response_length/max": 8.0,
        }
    )
    assert environment_metrics(GROUPS, 0.5, "test/")["test/env/all/correct"] == 0.25
    assert environment_metrics(GROUPS, 0.4)["env/all/correct"] == 0.5
    assert environment_metrics([], 0.5) == {}


def test_group_metrics():
    assert group_metrics(GROUPS, 0.5) == {
        "sdpo/groups_total": 2,
        "sdpo/groups_with_success": 1,
        "sdpo/success_fraction": 0.5,
        "sdpo/mean_group_success_rate": 0.25,
    }
    assert group_metrics([], 0.5)["sdpo/success_fraction"] == 0


def test_mean_advantage_is_over_trained_tokens():
    advantages_T = torch.tensor([1.0, -3.0, 100.0])
    assert mean_advantage(advantages_T, torch.tensor([1.0, 1.0, 0.0])) == {"sdpo/mean_advantage": -1.0}
    assert mean_advantage(advantages_T, torch.zeros(3)) == {}


def test_rollout_gap_is_over_trained_tokens():
    student_T, rollout_T = torch.tensor([-1.0, -2.0, 5.0]), torch.tensor([-1.5, -1.0, 0.0])
    gap = rollout_gap(student_T, rollout_T, torch.tensor([1.0, 1.0, 0.0]), [1, 2])
    assert gap["rollout_gap/mean"] == pytest.approx(0.75)
    assert gap["rollout_gap/max"] == pytest.approx(1.0)
    assert gap["rollout_gap/kl_k3"] == pytest.approx((math.exp(0.5) - 1.5 + math.exp(-1) - 0) / 2)
    assert rollout_gap(student_T, rollout_T, torch.zeros(3), [3]) == {}


def test_the_rollout_gap_by_depth_in_the_response():
    """Two responses of 20 and 130 tokens; the second has a gap from its 129th token on."""
    gap_T = torch.zeros(150)
    gap_T[20 + 128 :] = 0.5
    gap_T[3] = 0.36
    found = rollout_gap(gap_T, torch.zeros(150), torch.ones(150), [20, 130])
    by_depth = {key: value for key, value in found.items() if "depth" in key}
    assert by_depth == {
        "rollout_gap/depth_0": pytest.approx(0.36 / 32),
        "rollout_gap/depth_16": 0.0,
        "rollout_gap/depth_128": 0.5,
    }


def test_k3_estimates_the_divergence_of_the_server_from_the_trainer():
    server, trainer = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
    tokens = torch.multinomial(server, 200_000, True, generator=torch.Generator().manual_seed(0))
    gap = rollout_gap(trainer.log()[tokens], server.log()[tokens], torch.ones(len(tokens)), [len(tokens)])
    assert gap["rollout_gap/kl_k3"] == pytest.approx(
        (server * (server / trainer).log()).sum().item(), rel=0.02
    )


def test_quantiles_are_those_of_torch():
    at = [0.0, 0.5, 0.95, 0.99, 1.0]
    for count in (1, 2, 3, 100, 4097):
        values_T = torch.rand(count, generator=torch.Generator().manual_seed(count))
        assert quantiles(values_T, at) == [float(values_T.quantile(q)) for q in at]


def test_quantiles_of_more_numbers_than_torch_takes():
    values_T = torch.arange((1 << 24) + 8, dtype=torch.float32).div_(1 << 24)
    assert quantiles(values_T, [0.5, 0.99, 1.0]) == pytest.approx([0.5, 0.99, 1.0], abs=1e-6)
