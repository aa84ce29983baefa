"""Which gradients are looked at before a step."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sdpo_megatron.errors import RunFailed
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


@pytest.mark.parametrize(
    ("step", "norms", "advice"),
    [
        (
            0,
            [],
            "No optimizer step was made yet, so it is not the learning rate: the weights of model.path or of the ",
        ),
        (0, [1.0], "Lower optimizer.lr or look at rollouts/train "),
        (3, [], "Lower optimizer.lr or look at rollouts/train "),
    ],
)
def test_the_learning_rate_is_not_blamed_before_it_was_used(step: int, norms: list[float], advice: str):
    def everywhere(work: Callable[[], None]) -> None:
        work()

    learner: Any = SimpleNamespace(norms=norms, parallel=SimpleNamespace(rank=2, everywhere=everywhere))
    learner._what_to_do = lambda step: Learner._what_to_do(learner, step)
    with pytest.raises(RunFailed) as caught:
        Learner._refuse_non_finite(learner, [1.0, math.nan], "loss", step)
    start = f"The loss is nan at step {step} on rank 2: the run stops; its last checkpoint is intact. "
    assert str(caught.value).startswith(start + advice)
