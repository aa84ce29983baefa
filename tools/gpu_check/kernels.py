"""Time of each Triton kernel, in bytes per second beside a copy on the same device, at T 8,192.

Bytes are those of logits and gradients, each read or written once. The whole vocabulary of Qwen3 on one rank, and an
eighth of it, as with tensor parallelism of 8."""

from collections.abc import Iterator

import torch

from sdpo_megatron.kernels.objective import TokenLevel
from sdpo_megatron.kernels.rows import LogitRows, RowDivergence
from sdpo_megatron.kernels.vocab import VocabShard
from tools.gpu_check.machine import Machine, Row, attempt
from tools.kernel_launches import KERNELS, launches

ROWS, COLUMNS = 8192, (151_936, 18_992)


def run(machine: Machine) -> Iterator[Row]:
    copy = machine.copy_rate()
    yield {"what": "copy on the device", "GB/s": copy / 1e9}
    for columns in machine.pick(COLUMNS, (2_048,)):
        for dtype in (torch.bfloat16, torch.float32):
            yield from at_size(machine, machine.pick(ROWS, 4), columns, dtype, copy)
            machine.release()


def at_size(machine: Machine, rows: int, columns: int, dtype: torch.dtype, copy: float) -> Iterator[Row]:
    torch.manual_seed(0)
    student_TV, teacher_TV = (
        3 * torch.randn(rows, columns, device=machine.device, dtype=dtype) for _ in range(2)
    )
    target_T = torch.randint(columns, (rows,), device=machine.device)
    slope_T = torch.rand(rows, device=machine.device) + 0.1
    logits = LogitRows(student_TV, teacher_TV, target_T, VocabShard(start=0, vocab_size=columns))
    found = TokenLevel().evaluate(logits)
    assert found.teacher is not None
    rows_of = RowDivergence(
        student=found.student, teacher=found.teacher, divergence_U=slope_T, offset_U=slope_T
    )
    kernels = launches(logits, rows_of, slope_T)
    # sweeps come before gradients are written over the logits
    for name, launch in kernels.items():

        def measure(name: str = name, launch=launch) -> Row:
            moved = sum(KERNELS[name]) * rows * columns * dtype.itemsize
            seconds = machine.seconds(launch)
            rate = moved / seconds
            return {"ms": 1e3 * seconds, "GB/s": rate / 1e9, "of the copy's rate": rate / copy}

        yield from attempt(f"{name}, {columns} columns, {str(dtype).removeprefix('torch.')}", measure)
