"""Runs the Triton kernels, in Triton's interpreter, where the package would run the same maths in plain torch.

Triton decides when a kernel is defined: TRITON_INTERPRET=1 must stand in the environment before the first import."""

import sys
from types import ModuleType
from typing import Any

import numpy
import torch
import triton
import triton.language as tl
from triton import knobs

from sdpo_megatron.kernels import divergence, divergence_triton, softmax, softmax_triton

LAUNCHERS = [
    (softmax, "sweep_plain", softmax_triton.sweep_triton),
    (softmax, "write_gradient_plain", softmax_triton.write_gradient_triton),
    (divergence, "joint_sweep_plain", divergence_triton.joint_sweep_triton),
    (divergence, "mixture_plain", divergence_triton.mixture_triton),
    (divergence, "write_gradient_plain", divergence_triton.write_gradient_triton),
]
"""(module, name that the module calls on a CPU, the launcher that it calls on a GPU)"""


def interpret() -> None:
    if not knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 must be set before anything imports triton.")
    _check_interpreter()
    for module, name, launcher in LAUNCHERS:
        replace(module, name, launcher)


def replace(module: ModuleType, name: str, launcher: object) -> None:
    if not hasattr(module, name):
        raise RuntimeError(f"{module.__name__} has no {name} any more; extend {__name__}.")
    setattr(module, name, launcher)


jit: Any = triton.jit


@jit
def _count(X, bound):
    n = 0
    for _ in range(0, bound):
        n += 1
    tl.store(X, n)


def _check_interpreter() -> None:
    """Triton 3.6's makes numbers of arrays in a way that NumPy 2.4 refuses."""
    x_1 = torch.zeros(1, dtype=torch.int32)
    try:
        _count[(1,)](x_1, 3)
    except Exception as error:
        sys.exit(
            f"Triton {triton.__version__}'s interpreter does not work with NumPy {numpy.__version__} "
            f"({error}): install another NumPy, for example numpy<2.4, or a newer Triton."
        )
    assert int(x_1) == 3
