"""A vocabulary that tensor-parallel ranks share: which columns are whose, and numbers of every rank side by side."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

NEGATIVE = -1.0e30
"""Stands for minus infinity in float32 sums: finite, so that no difference of two of them is undefined."""


@dataclass(frozen=True, kw_only=True)
class VocabShard:
    """Which columns of the logits this rank holds, and what the logits mean."""

    start: int
    """Token id of the first column."""
    vocab_size: int
    """Tokens of the whole vocabulary; columns beyond it are padding and never part of the softmax."""
    group: dist.ProcessGroup | None = None
    """The ranks that share the vocabulary; None: this rank holds all of it."""
    temperature: float = 1.0
    """The softmax is of logits / temperature, as the sampler's."""

    @property
    def scale(self) -> float:
        return 1.0 / self.temperature

    def valid(self, columns: int) -> int:
        """Returns how many of this rank's `columns` are no padding."""
        return max(0, min(columns, self.vocab_size - self.start))

    def own(self, target_T: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        """Returns the column of each target in this rank's shard, and whether it is there (else the column is 0)."""
        local_T = target_T - self.start
        here_T = (local_T >= 0) & (local_T < self.valid(columns))
        return local_T.where(here_T, torch.zeros_like(local_T)), here_T

    def gather(self, x: Tensor) -> Tensor:
        """Returns `x` of every rank that shares the vocabulary: [ranks, *x.shape], in the order of the columns."""
        if self.group is None or self.group.size() == 1:
            return x[None]
        ranks = self.group.size()
        end_to_end = x.new_empty(ranks * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(end_to_end, x.contiguous(), group=self.group)
        return end_to_end.view(ranks, *x.shape)
