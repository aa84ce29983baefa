"""What ranks run: work that fails on some of them, and where each of them stands."""

import time
from typing import Any

import torch

from sdpo_megatron.algorithm.losses import build_terms
from sdpo_megatron.algorithm.losses.grpo import GrpoSettings
from sdpo_megatron.config import ParallelSettings
from sdpo_megatron.errors import ConfigError, PeerLost, RunFailed, ServerLost, ServerRefused
from sdpo_megatron.records import Sample
from sdpo_megatron.stopping import Stopped
from sdpo_megatron.trainer.batch import Batch
from sdpo_megatron.trainer.parallel import ParallelState, initialize
from sdpo_megatron.trainer.plan import Part, plan
from sdpo_megatron.trainer.score import Packer

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


def spread_and_gathered(layout: dict[str, int]) -> dict[str, Any]:
    """What this rank gets of a step of 6 samples, and what rank 0 gets back: of all, and of the first 3."""
    parallel = initialize(ParallelSettings.model_validate(layout), device=torch.device("cpu"), seed=0)
    losses: list[Any] = [term.loss for term in build_terms(GrpoSettings())]
    packer = Packer(parallel, micro_batch_tokens=8, share_prefixes=True)
    cut = {"dp": parallel.dp, "group_size": 2, "mini_batches": 1}
    parts = plan(SAMPLES, losses, packer.by_rank, **cut) if parallel.is_main else []
    part = Part.decoded(parallel.scatter_bytes([one.encoded() for one in parts]))
    batch = Batch(part, packer, losses, SAMPLES if parts else (), parts)
    ids_B = torch.tensor([float(k) for s in batch.samples for k in s.response_ids_T])
    # the ranks before the last stage, and the second of two that know the same, have nothing to say
    if parallel.owns_tokens:
        batch.record(torch.arange(len(ids_B)), student=ids_B, teacher=ids_B / 2)
    found = [batch.gathered(("student", "teacher", "computed"), parallel, n) for n in (None, 3, 0)]
    return {
        "own": [s.id for s in batch.samples],
        "found": [{name: numbers.tolist() for name, numbers in one.items()} for one in found],
        "metrics": batch.metrics(losses[0], 2, parallel),
    }


SAMPLES = [
    Sample(
        id=k,
        prompt_ids=[1, 2, k // 2],
        response_ids_T=[10 * k + t for t in range(k + 2)],
        rollout_logprobs_T=[-1.0] * (k + 2),
        loss_mask_T=[1] * (k + 2),
        teacher_prompt_ids=None,
        teacher_tokens=0,
        success=k % 2 == 0,
        group_advantage=0.0 if k // 2 == 1 else 0.5 - k % 2,
    )
    for k in range(6)
]
"""Three groups of two, of which the second has no signal."""
