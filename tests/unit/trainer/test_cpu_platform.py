"""The import hook for machines without a GPU: what it rewrites, what it leaves alone, and when it does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sdpo_megatron.trainer import cpu_platform

SOURCE = """
def place(x, other):
    where = torch.device("cuda")
    kind = 'torch.cuda.FloatTensor'
    y = x.cuda(non_blocking=True)
    z = torch.empty(3, pin_memory=True, device=torch.cuda.current_device())
    return where, kind, y, z, other.is_cuda, "cuda:0 is not a device name here"
"""


@pytest.fixture(autouse=True)
def without_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_platform, "_rewritten", set())


def rewritten(source: str) -> str:
    return ast.unparse(cpu_platform._Rewriter("a_module").visit(ast.parse(source)))


def test_rewrites_the_idioms_and_nothing_else() -> None:
    assert rewritten(SOURCE) == ast.unparse(
        ast.parse("""
def place(x, other):
    where = torch.device("cpu")
    kind = 'torch.FloatTensor'
    y = x.cpu()
    z = torch.empty(3, device=_cpu_as_cuda.current_device())
    return where, kind, y, z, other.is_cuda, "cuda:0 is not a device name here"
""")
    )


def test_only_megatron_core_goes_through_the_hook() -> None:
    for name in ("torch.cuda", "transformers", "megatron", "numpy.core", "megatron_core_like.x"):
        assert cpu_platform._Finder.find_spec(name) is None


def test_does_nothing_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if f is not cpu_platform._Finder])
    before = list(sys.meta_path)
    cpu_platform.install()
    assert sys.meta_path == before
    cpu_platform.check_rewritten()  # nothing was rewritten, and nothing has to be


def test_refuses_a_version_whose_idioms_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="Only 0 CUDA idioms were found in megatron.core"):
        cpu_platform.check_rewritten()


def test_refuses_to_come_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if f is not cpu_platform._Finder])
    monkeypatch.setitem(sys.modules, "megatron.core", cpu_platform)  # any module stands for an imported one
    with pytest.raises(RuntimeError, match="before megatron.core is imported"):
        cpu_platform.install()


CHILD = """
import torch
before = {name: vars(torch)[name] for name in ("empty", "zeros", "arange", "device", "cuda", "load")}
before_cuda = dict(vars(torch.cuda))
from sdpo_megatron.trainer import cpu_platform, model, optimizer, parallel
assert len(cpu_platform._rewritten) >= cpu_platform.FEWEST_REWRITES, len(cpu_platform._rewritten)
cpu_platform.check_rewritten()
assert all(vars(torch)[name] is value for name, value in before.items())
assert all(vars(torch.cuda).get(name) is value for name, value in before_cuda.items() if callable(value))
import megatron.core.tensor_parallel.random as rewritten_module
assert rewritten_module._cpu_as_cuda is cpu_platform.CUDA
with torch.device("meta"):
    assert torch.zeros(1).is_meta
print("fine")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="inert with a GPU")
def test_torch_stays_as_it_is() -> None:
    """In a process of its own, which imports what the trainer imports of the real megatron-core."""
    root = Path(__file__).parents[3]
    child = subprocess.run(
        [sys.executable, "-c", CHILD], cwd=root, capture_output=True, text=True, check=False
    )
    assert child.stdout.strip() == "fine", child.stderr
