"""Lets megatron-core, which takes a CUDA device for granted, run without one. It does nothing where torch sees a GPU.

`install()` adds an import hook that rewrites the CUDA idioms in the syntax trees of `megatron.core` as they are
imported; torch itself is not touched, and neither is any other package. What is rewritten:

    torch.cuda            ->  `CUDA` below, whose streams, events and random state are the CPU's
    "cuda"                ->  "cpu"        "torch.cuda.XTensor" -> "torch.XTensor"
    x.cuda(...)           ->  x.cpu()
    f(..., pin_memory=y)  ->  f(...)

A version of megatron-core in which the number of rewritten places falls under `FEWEST_REWRITES` has changed its idioms:
`check_rewritten()` then says so instead of letting half-rewritten code run.
"""

import ast
import contextlib
import importlib.machinery
import re
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

FEWEST_REWRITES = 200
"""megatron-core 0.16.1 has 312 such places in the modules that the trainer imports."""

_SKIPPED = ("megatron.core.distributed.fsdp", "megatron.core.nccl_allocator", "megatron.core.full_cuda_graph")
_rewritten: set[tuple[str, int]] = set()


class _Inert:
    """Stands for a CUDA stream or event: all work on a CPU is done when a call returns."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Inert)

    __hash__ = object.__hash__

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: "_Inert") -> float:
        return 0.0

    def record_event(self, *args: Any) -> "_Inert":
        return _Inert()

    def wait(self, *args: Any) -> None:
        return None

    wait_stream = wait_event = synchronize = record = wait


class _CpuAsCuda:
    """What `torch.cuda` means inside megatron.core on a CPU; anything not named here is torch.cuda's own."""

    Stream = Event = _Inert

    class nvtx:
        @staticmethod
        def range_push(*args: Any) -> None:
            return None

        range_pop = range_push

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    @property
    def random(self) -> "_CpuAsCuda":
        return self

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def current_stream(self, *args: Any) -> _Inert:
        return _Inert()

    default_stream = current_stream

    def stream(self, stream: Any = None) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def synchronize(self, *args: Any) -> None:
        return None

    set_device = empty_cache = synchronize


CUDA = _CpuAsCuda()


class _Rewriter(ast.NodeTransformer):
    def __init__(self, module: str):
        self.module = module

    def _count(self, node: ast.expr) -> None:
        _rewritten.add((self.module, node.lineno))

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if node.attr == "cuda" and isinstance(node.value, ast.Name) and node.value.id == "torch":
            self._count(node)
            return ast.copy_location(ast.Name("_cpu_as_cuda", node.ctx), node)
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, str) and (
            node.value == "cuda" or re.fullmatch(r"torch\.cuda\.\w+Tensor", node.value)
        ):
            self._count(node)
            value = "cpu" if node.value == "cuda" else node.value.replace(".cuda", "")
            return ast.copy_location(ast.Constant(value), node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        node.keywords = [k for k in node.keywords if k.arg != "pin_memory"]
        if isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            self._count(node)
            node.func.attr, node.args, node.keywords = "cpu", [], []
        return node


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> Any:
        """Compiles the rewritten source; the byte-code cache holds the stock code and is left alone."""
        tree = ast.parse(self.get_data(self.path))
        tree = ast.fix_missing_locations(_Rewriter(fullname).visit(tree))
        return compile(tree, self.path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["_cpu_as_cuda"] = CUDA
        super().exec_module(module)


class _Finder:
    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith("megatron.core.") or name.startswith(_SKIPPED):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec and type(spec.loader) is importlib.machinery.SourceFileLoader and spec.origin:
            spec.loader = _Loader(name, spec.origin)
        return spec


def install() -> None:
    """Adds the import hook. Must run before the first import of megatron.core; does nothing where a GPU is present."""
    if torch.cuda.is_available() or _Finder in sys.meta_path:
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError("cpu_platform.install() must run before megatron.core is imported.")
    sys.meta_path.insert(0, _Finder)  # type: ignore[arg-type]


def check_rewritten() -> None:
    """Must be called once megatron.core's training modules are imported.

    Raises RuntimeError where the rewriting found far fewer CUDA idioms than in the versions it was written for.
    """
    if not torch.cuda.is_available() and len(_rewritten) < FEWEST_REWRITES:
        raise RuntimeError(
            f"Only {len(_rewritten)} CUDA idioms were found in megatron.core, at least {FEWEST_REWRITES} expected: "
            "this version writes them in another way. Install megatron-core 0.16.1, or extend cpu_platform.py."
        )
