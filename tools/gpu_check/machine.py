"""The device under examination, and how time and memory are measured on it."""

import importlib.util
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

Row = dict[str, Any]
"""A result: `what` names it. `ok`: whether a bound holds; `failed`, `skipped`: why there is no figure. Others are
figures, whose names give their units."""


@dataclass(frozen=True)
class Machine:
    device: torch.device

    @property
    def is_gpu(self) -> bool:
        """Whether it is a GPU: on a CPU sizes are small and times say nothing about any kernel."""
        return self.device.type == "cuda"

    def pick(self, on_gpu: Any, on_cpu: Any) -> Any:
        return on_gpu if self.is_gpu else on_cpu

    def wait(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, run: Callable[[], object], runs: int = 10) -> float:
        """Returns the median of `runs`, after two that are not counted; a single one of each on a CPU."""
        for _ in range(self.pick(2, 1)):
            run()
        return statistics.median(self._once(run) for _ in range(self.pick(runs, 1)))

    def _once(self, run: Callable[[], object]) -> float:
        if not self.is_gpu:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def extra_bytes(self, run: Callable[[], object]) -> int | None:
        """Returns the most that `run` has allocated at once, beyond what was there; None on a CPU."""
        if not self.is_gpu:
            run()
            return None
        self.wait()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device) - before

    def copy_rate(self) -> float:
        """Returns the bytes per second of a copy on the device, those read and those written."""
        source = torch.empty(self.pick(2**32, 2**26), dtype=torch.uint8, device=self.device).random_()
        target = torch.empty_like(source)
        return 2 * source.numel() / self.seconds(lambda: target.copy_(source))

    def matrix_rate(self) -> float:
        """Returns the floating-point operations per second of a large product of random matrices in bfloat16."""
        size = self.pick(8192, 512)
        a, b = (torch.randn(size, size, device=self.device).bfloat16() for _ in range(2))
        return 2 * size**3 / self.seconds(lambda: a @ b)

    def release(self) -> None:
        if self.is_gpu:
            torch.cuda.empty_cache()


def attempt(what: str, measure: Callable[[], Row]) -> Iterator[Row]:
    """Yields the row that `measure` makes, or why there is none: one failure does not end a part. Its traceback goes to
    the part's log."""
    try:
        yield {"what": what, **measure()}
    # whatever a kernel, a compiler or a library raises is what is to be reported
    except Exception as error:
        traceback.print_exc()
        text = " ".join(str(error).split())
        yield {"what": what, "ok": False, "failed": f"{type(error).__name__}: {text[:300]}"}


def lacks(*modules: str) -> str | None:
    """Returns which of these Python modules cannot be found, in words."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"{', '.join(missing)} not installed" if missing else None
