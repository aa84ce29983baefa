"""Per-token numbers of several samples, end to end (axis B)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sdpo_megatron.algorithm.batching import Microbatch


class Ragged:
    """Where each sample's response tokens lie in flat tensors [B] of the numbers of several samples."""

    def __init__(self, lengths: Sequence[int], ids: Sequence[int] | None = None):
        """`ids` are the samples' ids, by default 0, 1, ..."""
        self.starts = torch.tensor([0, *lengths]).cumsum(0)
        ids_B = torch.arange(len(lengths)) if ids is None else torch.tensor(ids, dtype=torch.int64)
        # by id, since micro-batches name their samples by it
        self._index_of = torch.zeros(int(ids_B.max()) + 1 if len(lengths) else 0, dtype=torch.int64)
        self._index_of[ids_B] = torch.arange(len(lengths))

    def zeros(self) -> Tensor:
        return torch.zeros(int(self.starts[-1]))

    def place_M(self, microbatch: Microbatch) -> Tensor:
        """Returns where the micro-batch's response tokens lie in the flat tensor."""
        return self.starts[self._index_of[microbatch.sample_M]] + microbatch.index_M

    def where(self, chosen: Sequence[bool]) -> Tensor:
        """Returns the places of the chosen samples' tokens, int64."""
        return torch.repeat_interleave(torch.tensor(chosen, dtype=torch.bool), self.starts.diff()).nonzero()[
            :, 0
        ]

    def flatten(self, rows: Sequence[Sequence[float]]) -> Tensor:
        none = np.zeros(0, np.float32)
        return torch.from_numpy(np.concatenate([none, *(np.asarray(row, np.float32) for row in rows)]))

    def firsts(self, counts: Sequence[int]) -> Tensor:
        """Returns 1 for each sample's first tokens, as many as `counts` says, and 0 for the others."""
        ends = self.starts[:-1] + torch.tensor(counts, dtype=torch.int64)
        index_B = torch.arange(int(self.starts[-1]))
        return (index_B < torch.repeat_interleave(ends, self.starts.diff())).float()

    def spread(self, values: Sequence[float]) -> Tensor:
        """Returns one number per sample, repeated for each of its tokens."""
        return torch.repeat_interleave(torch.tensor(values, dtype=torch.float32), self.starts.diff())

    def split(self, flat: Tensor) -> list[list[float]]:
        starts, values = self.starts.tolist(), flat.tolist()
        return [values[a:b] for a, b in zip(starts[:-1], starts[1:], strict=True)]
