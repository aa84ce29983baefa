"""Compiles the Triton kernels for GPUs that need not be there, and reads the machine code.

    python tools/aot_kernels.py [--targets sm_90 gfx942] [--kernels sweep gradient] [--dtypes bf16] [--json FILE]

The package's own launchers run, with arguments as in training (Qwen3's vocabulary of 151,936 over 8 ranks, aligned
tensors), up to the point where the kernel would start: block sizes, warps, types and alignments are those of a launch.
One row per kernel, type of the logits, and target:

    regs, spills   registers of a thread (AMD: vector registers), instructions (AMD: registers) that spill them
    shared         bytes of shared memory
    loads, stores  how many of which width in bits, of global memory; loads in the counted code, stores in all of it
    inst/el        instructions per element (of each tensor of the logits' size) in the counted code
    mufu/el        of these, exponentials and logarithms (MUFU; v_exp, v_log)
    bytes/el       memory traffic of logits and gradients

The counted code is the loop with the exponentials in a sweep over a row, and the whole program, with the branch for
rows without a gradient, in a gradient kernel. Counts are lower bounds of time: latency and barriers are not in them.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

# it decides at import, and an interpreted kernel cannot be compiled
os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parents[1]))

from sdpo_megatron.files import output_file
from sdpo_megatron.kernels.rows import LogitRows, RowDivergence, RowSoftmax
from sdpo_megatron.kernels.vocab import VocabShard
from tools.kernel_launches import KERNELS, launches

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ROWS, COLUMNS, RANKS = 16, 18_992, 8
SHARD = VocabShard(start=COLUMNS, vocab_size=COLUMNS * RANKS)
NVIDIA_TOOLS = Path(str(triton.__file__)).parent / "backends/nvidia/bin"


def launchers(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Returns the launch of each kernel. Of the arguments only types, strides and alignments count."""
    logits_UV = torch.zeros(ROWS, COLUMNS, dtype=dtype)
    target_U, row_U = torch.zeros(ROWS, dtype=torch.int64), torch.zeros(ROWS)
    softmax = RowSoftmax(row_U, row_U, row_U, row_U)
    logits = LogitRows(logits_UV, logits_UV, target_U, SHARD)
    rows = RowDivergence(student=softmax, teacher=softmax, divergence_U=row_U, offset_U=row_U)
    return launches(logits, rows, row_U)


class Code(NamedTuple):
    """Machine code: `labels` are places in `instructions`."""

    instructions: list[str]
    labels: dict[str, int]


def main() -> int:
    options = parse()
    rows = []
    print(line(dict(zip(COLUMN_WIDTHS, COLUMN_WIDTHS, strict=True))))
    for target in options.targets:
        for dtype in options.dtypes:
            for name in options.kernels:
                rows.append(measure(name, dtype, target))
                print(line(rows[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, choices in (("targets", TARGETS), ("dtypes", DTYPES), ("kernels", KERNELS)):
        parser.add_argument(f"--{name}", nargs="+", choices=choices, default=list(choices), metavar="NAME",
                            help=f"all unless given: {', '.join(choices)}")  # fmt: skip
    parser.add_argument("--json", type=output_file, help="where to write the rows besides showing them")
    return parser.parse_args()


COLUMN_WIDTHS = {
    "kernel": 28, "dtype": 6, "target": 7, "regs": 5, "spills": 7, "shared": 7, "loads": 16, "stores": 7,
    "inst/el": 8, "mufu/el": 8, "bytes/el": 8,
}  # fmt: skip


def line(row: dict[str, Any]) -> str:
    return "".join(f"{shown(row[name]):<{width}}" for name, width in COLUMN_WIDTHS.items()).rstrip()


def shown(cell: Any) -> str:
    if isinstance(cell, dict):
        return ",".join(f"{count}x{bits}" for bits, count in sorted(cell.items(), reverse=True))
    return f"{cell:.2f}" if isinstance(cell, float) else str(cell)


def measure(name: str, dtype: str, target: str) -> dict[str, Any]:
    """Returns one row of the table; `elements` is how many of each tensor a thread has in the counted code."""
    binary, launched_with = compiled(launchers(DTYPES[dtype])[name], TARGETS[target])
    code, registers, spills = read_cubin(binary) if "cubin" in binary.asm else read_amdgcn(binary)
    counted = code.instructions if KERNELS[name][1] else hot_loop(code)
    elements = launched_with["BLOCK"] // (launched_with["num_warps"] * TARGETS[target].warp_size)
    special = sum(bool(re.match(r"MUFU\.(EX2|LG2)|v_(exp|log)_f32", i)) for i in counted)
    return {
        "kernel": name,
        "dtype": dtype,
        "target": target,
        "regs": registers,
        "spills": spills,
        "shared": binary.metadata.shared,
        "loads": accesses(r"LDG|(global|buffer)_load", counted),
        "stores": accesses(r"STG|(global|buffer)_store", code.instructions),
        "elements": elements,
        "inst/el": len(counted) / elements,
        "mufu/el": special / elements,
        "bytes/el": sum(KERNELS[name]) * DTYPES[dtype].itemsize,
    }


def compiled(launch: Callable[[], object], target: GPUTarget) -> tuple[Any, dict[str, Any]]:
    """Returns the kernel that a launcher would start on the target, and the constants and options that it gives it."""
    launches: list[tuple[Any, dict[str, Any]]] = []
    run = JITFunction.run

    def compile_only(function: JITFunction, *args: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append((run(function, *args, warmup=True, **kwargs), kwargs))

    # What Triton asks its driver before it starts a kernel; the "device" only keys a cache.
    absent = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: target,
        get_current_stream=lambda device: 0,
    )
    driver.set_active(absent)  # type: ignore[arg-type]
    with mock.patch.object(JITFunction, "run", compile_only):
        launch()
    (only,) = launches
    return only


def read_cubin(binary: Any) -> tuple[Code, int, int]:
    """Returns code, registers, spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        assembly = tool("nvdisasm", "--print-code", file.name)
    code = parse_code(assembly, r"(\.L_x_\d+):", r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z].*?)\s*;")
    while code.instructions[-1] == "NOP":
        code.instructions.pop()
    # a branch to itself, which never runs
    guard = code.instructions.pop()
    assert guard.startswith("BRA"), guard
    spills = sum(bool(re.match("LDL|STL", i)) for i in code.instructions)
    return code, int(re.findall(r"REG:(\d+)", usage)[0]), spills


def tool(name: str, *args: str) -> str:
    return subprocess.run([NVIDIA_TOOLS / name, *args], capture_output=True, text=True, check=True).stdout


def read_amdgcn(binary: Any) -> tuple[Code, int, int]:
    """Returns code, vector registers, spilled registers."""
    assembly = binary.asm["amdgcn"]
    code = parse_code(assembly, r"(\.LBB\d+_\d+):", r"\t([a-z].*?)\s*(?:;.*)?$")
    number = {key: int(value) for key, value in re.findall(r"^\s+\.(\w+): +(\d+)$", assembly, re.MULTILINE)}
    return code, number["vgpr_count"], number["vgpr_spill_count"] + number["sgpr_spill_count"]


def parse_code(assembly: str, label: str, instruction: str) -> Code:
    code = Code([], {})
    for text in assembly.splitlines():
        if found := re.match(label, text):
            code.labels[found[1]] = len(code.instructions)
        elif found := re.match(instruction, text):
            code.instructions.append(found[1])
    return code


def hot_loop(code: Code) -> list[str]:
    """Returns the shortest loop with exponentials."""
    loops = []
    for at, instruction in enumerate(code.instructions):
        to = re.match(r"(?:BRA|s_c?branch)\S* .*?(\.L\w+)", instruction)
        if to and code.labels[to[1]] <= at:
            loops.append(code.instructions[code.labels[to[1]] : at + 1])
    return min((loop for loop in loops if any(re.match("MUFU.EX2|v_exp", i) for i in loop)), key=len)


def accesses(kind: str, instructions: list[str]) -> dict[int, int]:
    """Returns the number of instructions of a kind by their width in bits."""
    found: Counter[int] = Counter()
    for instruction in instructions:
        if re.match(kind, instruction):
            name = instruction.split()[0]
            if words := re.search(r"dword(?:x(\d))?$", name):
                found[32 * int(words[1] or 1)] += 1
            else:
                narrow = re.search(r"\.[US](8|16)\b|_[a-z]*(short|byte)", name)
                wide = re.search(r"\.(64|128|256)\b", name)
                found[int(wide[1]) if wide else 16 if narrow else 32] += 1
    return dict(found)


if __name__ == "__main__":
    raise SystemExit(main())
