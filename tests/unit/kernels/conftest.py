"""Which kernels a test runs: plain torch, or Triton's on a GPU, in the interpreter where there is none."""

from functools import partial

import pytest
import torch
from triton import knobs

from tools.gpu_check.interpreter import LAUNCHERS

BLOCK = 256
"""Small, so that a row of a thousand columns has several blocks."""


@pytest.fixture(params=["plain", "triton"])
def kernels(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def device(kernels: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the tensors of the test must be for these kernels to run."""
    if kernels == "plain":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    assert knobs.runtime.interpret, "tests/conftest.py did not come first"
    for module, name, launcher in LAUNCHERS:
        monkeypatch.setattr(module, name, partial(launcher, block=BLOCK))
    return "cpu"
