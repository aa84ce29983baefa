"""What `tools/aot_kernels.py` reads in the kernels' machine code, for every target and type: no GPU is needed.

The bounds are those at which memory, and not the instructions, sets the time of an H100. All combinations are compiled,
about 40 s of CPU; Triton keeps what has not changed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
GRADIENTS = ("gradient", *(f"divergence_gradient_{kind}" for kind in ("forward", "mixture", "reverse")))
KERNELS = ("sweep", "joint_sweep_forward", "joint_sweep_reverse", "mixture", *GRADIENTS)
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


class Most(NamedTuple):
    instructions: float
    """Per element."""
    registers: int | None = None


MOST_ON_SM_90 = {
    "sweep": Most(12.8, registers=56),
    "gradient": Most(16.0),
    "joint_sweep_forward": Most(33.1, registers=72),
    "joint_sweep_reverse": Most(33.1, registers=72),
    "mixture": Most(35.0, registers=72),
    "divergence_gradient_forward": Most(27.5),
    "divergence_gradient_mixture": Most(53.0),
    "divergence_gradient_reverse": Most(27.5),
}

H100_BYTES = 3.35e12
H100_SM_CYCLES = 132 * 1.755e9
"""Per second, as the bytes."""

Rows = dict[tuple[str, str, str], dict[str, Any]]


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """By kernel, type and target. In a process of its own, with the interpreter asked for as in the other tests."""
    path = tmp_path_factory.mktemp("aot") / "kernels.json"
    done = subprocess.run(
        [sys.executable, "tools/aot_kernels.py", "--json", str(path)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {(row["kernel"], row["dtype"], row["target"]): row for row in json.loads(path.read_text())}


def test_every_kernel_is_there(rows):
    assert set(rows) == {(k, d, t) for k in KERNELS for d in ("bf16", "fp32") for t in TARGETS}
    assert set(MOST_ON_SM_90) == set(KERNELS)


@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_spills(rows, kernel):
    assert [key for key, row in rows.items() if key[0] == kernel and row["spills"] != 0] == []


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_logits_and_gradients_move_128_bits_at_a_time(rows, kernel, dtype, target):
    row = rows[kernel, dtype, target]
    bits = 8 * {"bf16": 2, "fp32": 4}[dtype] * row["elements"]
    reads = 1 if kernel in ("sweep", "gradient") else 2
    assert row["loads"].get("128") == reads * bits / 128
    assert "16" not in row["loads"]
    if kernel in GRADIENTS:
        assert row["stores"] == {"128": 2 * bits / 128}, "the gradient, and zeros in rows without one"


@pytest.mark.parametrize("kernel", KERNELS)
def test_instructions_and_registers(rows, kernel):
    row, most = rows[kernel, "bf16", "sm_90"], MOST_ON_SM_90[kernel]
    assert row["inst/el"] <= most.instructions
    assert most.registers is None or row["regs"] <= most.registers


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_memory_binds_on_an_h100(rows, kernel, dtype):
    """An SM starts 128 instructions of a thread in a cycle, and 16 exponentials or logarithms."""
    row = rows[kernel, dtype, "sm_90"]
    memory = row["bytes/el"] / H100_BYTES
    assert row["inst/el"] / (128 * H100_SM_CYCLES) < memory
    assert 0 < row["mufu/el"] / (16 * H100_SM_CYCLES) < memory
