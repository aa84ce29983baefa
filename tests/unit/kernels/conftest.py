"""Which kernels a test runs: plain torch, or Triton's on a GPU, in the interpreter where there is none."""

from functools import partial

import pytest
import torch
from triton import knobs

from sdpo_megatron.kernels import divergence, divergence_triton, token_sdpo

BLOCK = 256
"""Small, so that a row of a thousand columns has several blocks."""

LAUNCHERS = [
    (token_sdpo, "sweep_plain", token_sdpo.sweep_triton),
    (token_sdpo, "write_gradient_plain", token_sdpo.write_gradient_triton),
    (divergence, "joint_sweep_plain", divergence_triton.joint_sweep_triton),
    (divergence, "mixture_plain", divergence_triton.mixture_triton),
    (divergence, "write_gradient_plain", divergence_triton.write_gradient_triton),
]


@pytest.fixture(params=["plain", "triton"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the tensors of the test must be."""
    if request.param == "plain":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    assert knobs.runtime.interpret, "tests/conftest.py did not come first"
    for module, name, launcher in LAUNCHERS:
        monkeypatch.setattr(module, name, partial(launcher, block=BLOCK))
    return "cpu"
