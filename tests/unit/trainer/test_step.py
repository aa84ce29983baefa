"""Which gradients are looked at before a step."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sdpo_megatron.trainer.step import Learner


def buffer(*gradient: float) -> Any:
    return SimpleNamespace(grad_data=torch.tensor(gradient))


@pytest.mark.parametrize(
    ("dense", "expert", "largest"),
    [
        ([buffer(1.0, -3.0), buffer(2.0)], [], 3.0),
        ([buffer(1.0)], [buffer(-4.0)], 4.0),
        ([buffer(1.0)], [buffer(math.nan)], math.nan),
        ([buffer(-math.inf)], [buffer(1.0)], math.inf),
    ],
)
def test_gradients_of_experts_are_looked_at_too(dense: list[Any], expert: list[Any], largest: float):
    chunk = SimpleNamespace(buffers=dense, expert_parallel_buffers=expert)
    learner: Any = SimpleNamespace(chunks=[chunk])
    assert Learner._largest_gradient(learner) == pytest.approx(largest, nan_ok=True)
