"""What ranks run: work that fails on some of them, and where each of them stands."""

import time

import torch

from sdpo_megatron.config import ParallelSettings
from sdpo_megatron.errors import ConfigError, PeerLost, RunFailed, ServerLost, ServerRefused
from sdpo_megatron.stopping import Stopped
from sdpo_megatron.trainer.parallel import ParallelState, initialize

FAILURES: list[dict[int, Exception]] = [
    {0: ConfigError("mend\nthis", ["end of a log"])},
    {1: RunFailed("the end")},
    {1: ServerRefused("no")},
    {0: ServerLost("first"), 2: RunFailed("second")},
    {2: Stopped()},
    {1: PeerLost("gone")},
    {0: ServerLost("first"), 1: ValueError("a bug")},
]


def fail_everywhere() -> list[list[str]]:
    """The error that this rank raises, its message and its cause, for each of FAILURES."""
    parallel = initialize(ParallelSettings(dp=3), device=torch.device("cpu"), seed=0)
    return [_failed(parallel, failures.get(parallel.rank)) for failures in FAILURES]


def _failed(parallel: ParallelState, own: Exception | None) -> list[str]:
    def work() -> None:
        if own is not None:
            raise own

    try:
        parallel.everywhere(work)
    except Exception as error:
        return [type(error).__name__, str(error), repr(error.__cause__)]
    raise AssertionError("it did not fail")


def succeed_everywhere() -> list[int]:
    """This rank's result, and how many collectives it took to learn that no rank failed."""
    parallel = initialize(ParallelSettings(dp=2), device=torch.device("cpu"), seed=0)
    calls: list[str] = []
    gather, largest = ParallelState.gather, ParallelState.largest
    ParallelState.gather = lambda self, value: calls.append("gather") or gather(self, value)  # type: ignore[method-assign]
    ParallelState.largest = lambda self, value: calls.append("largest") or largest(self, value)  # type: ignore[method-assign]
    result = parallel.everywhere(lambda: 7 + parallel.rank)
    assert calls == ["largest"]
    return [result, len(calls)]


def place(layout: dict[str, int]) -> dict[str, int]:
    """Sizes, ranks and duties of this rank in `layout`."""
    parallel = initialize(ParallelSettings.model_validate(layout), device=torch.device("cpu"), seed=0)
    axes = ("tp", "pp", "dp", "cp", "ep", "vpp", "tp_rank", "pp_rank", "dp_rank", "cp_rank", "ep_rank")
    duties = ("is_first_replica", "leads_stage", "owns_tokens")
    return {name: int(getattr(parallel, name)) for name in (*axes, *duties)}


def wait_for_rank_0() -> int:
    """Rank 0 takes longer than any collective of the model may."""
    parallel = initialize(ParallelSettings(dp=2), device=torch.device("cpu"), seed=0, timeout_s=1.0)
    parallel.everywhere(lambda: time.sleep(3.0 if parallel.is_main else 0.0))
    return parallel.share(7)
