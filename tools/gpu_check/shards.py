"""A vocabulary's shards one after another in one process, joined by nothing but their all-gathers.

A rank is started again whenever it met an all-gather whose parts were not all known yet."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from sdpo_megatron.kernels.vocab import VocabShard

Result = TypeVar("Result")


class _WaitsForOthers(Exception):
    pass


@dataclass(frozen=True, kw_only=True)
class ReplayedShard(VocabShard):
    known: list[Tensor]
    """What earlier all-gathers gave."""
    offers: list[Tensor]
    calls: Iterator[int] = field(default_factory=itertools.count)

    def gather(self, x: Tensor) -> Tensor:
        call = next(self.calls)
        if call < len(self.known):
            return self.known[call]
        self.offers.append(x)
        raise _WaitsForOthers


def on_every_shard(
    shards: int,
    columns: int,
    vocab_size: int,
    temperature: float,
    run: Callable[[VocabShard], Result],
) -> list[Result]:
    """Returns `run`(shard) of all ranks, which have `columns` each."""
    known: list[Tensor] = []
    while True:
        offers: list[Tensor] = []
        results: list[Result] = []
        for rank in range(shards):
            shard = ReplayedShard(
                start=rank * columns,
                vocab_size=vocab_size,
                temperature=temperature,
                known=known,
                offers=offers,
            )
            try:
                results.append(run(shard))
            except _WaitsForOthers:
                continue
        if not offers:
            return results
        assert len(offers) == shards, "all ranks gather, or none does"
        known.append(torch.stack(offers))
