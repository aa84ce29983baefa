"""What `tools/bench_kernels.py` derives: bytes that implementations read, write and keep; its arguments."""

import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tools import bench_kernels
from tools.bench_kernels import IMPLEMENTATIONS, Inputs, Shape, counted

QWEN3 = Shape(tokens=8192, vocab=151_936, tp=8, hidden=4096, chunk=256, dtype="bfloat16")
SMALL = Shape(tokens=6, vocab=128, tp=1, hidden=16, chunk=4, dtype="bfloat16")
PLAIN = [name for name in IMPLEMENTATIONS if name.startswith(("eager", "Megatron"))]


@pytest.mark.parametrize(
    ("name", "per_logit"),
    [
        ("ours: token level", 8),
        ("ours: reverse KL", 10),
        ("ours: forward KL", 10),
        ("ours: JSD 0.5", 14),
        ("ours: top 20", 10),
        ("eager: token level", 50),
        ("Megatron: cross entropy, twice", 90),
        ("Liger: cross entropy, twice", 30),
    ],
)
def test_bytes_per_logit_in_bfloat16(name, per_logit):
    row = bench_kernels.row(name, QWEN3, runs=0)
    assert row["B/logit"] == per_logit
    assert row["H100 ms (estimate)"] == pytest.approx(1e3 * per_logit * 8192 * 18_992 / 3.35e12)


NOT_READ = {"gather", "index", "index_put_", "scatter_add", "scatter_add_", "new_zeros"}
NOT_WRITTEN = {"index_put_", "scatter_add", "scatter_add_"}
"""Operators that touch single elements; `scatter_add` is in place where no mode such as this is on."""


class Traffic(TorchDispatchMode):
    """Bytes of tensors of the logits' size that operators read and write."""

    def __init__(self, logits: int):
        super().__init__()
        self.logits, self.total = logits, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in ("detach", "empty", "empty_like"):
            self.total += 0 if name in NOT_READ else sum(map(self.size, tree_leaves(args)))
            self.total += 0 if name in NOT_WRITTEN else sum(map(self.size, tree_leaves(out)))
        return out

    def size(self, x: object) -> int:
        """0 for what is smaller, or expanded from something smaller."""
        whole = isinstance(x, Tensor) and x.numel() == self.logits and 0 not in x.stride()
        return x.numel() * x.element_size() if isinstance(x, Tensor) and whole else 0


@pytest.fixture(autouse=True)
def no_process_group_is_left():
    """Megatron's cross entropy makes one."""
    yield
    if torch.distributed.is_initialized():
        from sdpo_megatron.trainer import parallel

        parallel.shut_down()


def traffic(run: Callable[[Inputs], None], shape: Shape) -> float:
    run(Inputs(shape, torch.device("cpu"), hidden=False))  # Megatron's sets itself up
    x = Inputs(shape, torch.device("cpu"), hidden=False)
    with Traffic(shape.tokens * shape.columns) as counting:
        run(x)
    return counting.total / (shape.tokens * shape.columns)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", PLAIN)
def test_derivations_are_what_the_operators_read_and_write(name, dtype):
    shape = replace(SMALL, dtype=dtype)
    assert counted(IMPLEMENTATIONS[name].passes, shape.sizes())[0] == traffic(
        IMPLEMENTATIONS[name].run, shape
    )


def test_derivations_say_what_happens_at_the_shape():
    passes = IMPLEMENTATIONS["eager: token level"].passes
    back = "gather' 0+4, log_softmax' 8+4"
    assert counted(passes, SMALL.sizes()) == (50, f"casts 4+8, log_softmax 8+8, {back}, cast 4+2")
    assert counted(passes, replace(SMALL, dtype="float32").sizes()) == (32, f"log_softmax 8+8, {back}")


def test_memory_from_hidden_states_is_that_of_the_head_and_of_chunks():
    """Head's gradient, a chunk's share of it, a chunk's logits of both models, hidden states' gradient."""
    head, logits, hidden = 4 * 4096 * 18_992, 2 * 256 * 18_992, 2 * 8192 * 4096
    row = bench_kernels.row("ours from hidden states: reverse KL", QWEN3, runs=0)
    assert row["extra GB (estimate)"] == pytest.approx((2 * head + 2 * logits + hidden) / 1e9)


@pytest.mark.parametrize(
    ("vocab", "tp", "columns"), [(151_936, 8, 18_992), (50_257, 1, 50_257), (50_257, 4, 12_672)]
)
def test_columns_are_padded_where_they_do_not_divide(vocab, tp, columns):
    assert replace(QWEN3, vocab=vocab, tp=tp).columns == columns


@pytest.mark.parametrize("name", ["tokens", "vocab", "tp", "hidden", "chunk", "runs"])
def test_wrong_arguments_end_with_one_line(name, capsys, monkeypatch):
    argv = ["bench_kernels.py", "--tokens", "8", "--vocab", "64", f"--{name}", "0"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit, match="2"):
        bench_kernels.main()
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"error: --{name} is 0; it must be at least 1")


def test_static_table_has_a_line_per_implementation_and_says_estimate(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", "--tokens", "8", "--vocab", "64", "--static"])
    bench_kernels.main()
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(IMPLEMENTATIONS)
    assert "H100 ms (estimate)" in table[0] and "extra GB (estimate)" in table[0]
    assert "measured" not in table[0] and "estimate" in " ".join(lines[len(table) :])
