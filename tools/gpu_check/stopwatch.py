"""Seconds of a training step's parts, by the device's own clock."""

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tools.gpu_check.machine import Machine

PARTS = ("pack", "teacher", "forward", "loss", "backward", "optimizer", "step")


class Stopwatch:
    """`learn` holds forward, loss, backward and optimizer; what is left of it is the backward pass."""

    def __init__(self, machine: Machine):
        self.machine = machine
        self._steps: list[dict[str, list[tuple[Any, Any]]]] = []
        self._open: dict[str, Any] = {}

    def begin_step(self) -> None:
        self._steps.append(defaultdict(list))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.start(name)
        yield
        self.stop(name)

    def start(self, name: str) -> None:
        self._open[name] = self._now()

    def stop(self, name: str) -> None:
        self._steps[-1][name].append((self._open.pop(name), self._now()))

    def _now(self) -> Any:
        if not self.machine.is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def medians(self) -> dict[str, float]:
        """Returns the seconds, by part."""
        self.machine.wait()
        steps = []
        for marks in self._steps:
            found = {name: sum(self._between(a, b) for a, b in pairs) for name, pairs in marks.items()}
            inside = sum(found.get(name, 0.0) for name in ("forward", "loss", "optimizer"))
            steps.append(found | {"backward": found.get("learn", 0.0) - inside})
        return {name: statistics.median(step.get(name, 0.0) for step in steps) for name in PARTS}

    def _between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3 if self.machine.is_gpu else end - start
