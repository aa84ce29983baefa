"""Samples to micro-batches: what is computed together, on which data-parallel rank, and where the loss
looks."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdpo_megatron.algorithm.token_tree import build, sort_with_overlaps
from sdpo_megatron.records import Sample

_FULL_ENOUGH = 0.75
"""A micro-batch that holds this share of its limit may end early, at a place where less has to be computed twice."""


class View(NamedTuple):
    """A response behind the prompt of one of its readers, student or teacher."""

    sample_id: int
    prompt_ids: Sequence[int]
    response_ids_T: Sequence[int]

    def input_ids(self) -> np.ndarray:
        """Returns the token ids that the model reads, uint32. The last token of a response is left out: nothing is
        predicted from it."""
        parts = (self.prompt_ids, self.response_ids_T[:-1])
        return np.concatenate([np.asarray(part, np.uint32) for part in parts])


@dataclass(frozen=True)
class Microbatch:
    """Packed tokens, without padding, and where the loss finds what it needs; the tensors are on the CPU.

    M runs over all response tokens, sample after sample, H over the hidden states that predict one.
    """

    sample_ids: list[int]
    ids_S: Tensor
    """Token ids, int64."""
    positions_S: Tensor
    """Distance of each token from the beginning of its sequence, int64."""
    cu_seqlens_N1: list[int]
    """Segment n is [cu_seqlens_N1[n], cu_seqlens_N1[n + 1])."""
    parents_N: list[int]
    """The earlier segment that segment n continues; -1 for none."""
    place_H: Tensor
    """The places in S whose final hidden states predict a response token, sorted, int64."""
    hidden_row_M: Tensor
    """For each response token, the place in H that predicts it, int64."""
    targets_M: Tensor
    """Ids of the response tokens, int64."""
    sample_M: Tensor
    """The sample id of each response token, int64."""
    index_M: Tensor
    """The index of each token in its response, int64."""


def student_views(samples: Sequence[Sample]) -> list[View]:
    """Returns every sample that has a response, behind the prompt it was sampled from."""
    return [View(s.id, s.prompt_ids, s.response_ids_T) for s in samples if len(s.response_ids_T)]


def teacher_views(samples: Sequence[Sample]) -> list[View]:
    """Returns every sample that has a teacher, cut to what fits the teacher's context."""
    return [
        View(s.id, s.teacher_prompt_ids, s.response_ids_T[: s.teacher_tokens])
        for s in samples
        if s.teacher_prompt_ids is not None and s.teacher_tokens > 0
    ]


def split_mini_batches(samples: Sequence[Sample], group_size: int, count: int) -> list[list[Sample]]:
    """Divides the samples of a step, in order, into `count` parts of whole problems, whose sizes differ by one problem
    at most; there are no fewer problems than parts."""
    problems = sorted({sample.id // group_size for sample in samples})
    assert 0 < count <= len(problems)
    part_of = {problem: k * count // len(problems) for k, problem in enumerate(problems)}
    parts: list[list[Sample]] = [[] for _ in range(count)]
    for sample in samples:
        parts[part_of[sample.id // group_size]].append(sample)
    return parts


def pack(views: Sequence[View], budget: int, dp: int, share: bool = True) -> list[list[list[int]]]:
    """Returns, for each of the dp ranks, the sample ids of each of its micro-batches; all ranks have equally
    many micro-batches.

    A micro-batch holds at most `budget` tokens, a common beginning counted once if `share`; a longer single
    view gets one of its own. Views that begin alike, siblings above all, are put together; sizes are
    balanced; a rank's largest comes first. A micro-batch is empty only where there are too few views for
    equal numbers; without any view there are no micro-batches.
    """
    if not views:
        return [[] for _ in range(dp)]
    sequences = [view.input_ids() for view in views]
    order, overlaps = sort_with_overlaps(sequences)
    lengths = [len(sequences[index]) for index in order]
    run = _Run(lengths, overlaps if share else [0] * len(order))
    needed = len(run.cut(budget))
    count = -(-needed // dp) * dp
    parts = run.divide(count, budget)
    chunks = [[views[order[k]].sample_id for k in range(start, end)] for start, end in parts]
    costs = [run.cost(start, end) for start, end in parts]
    return _deal(chunks, costs, dp)


def microbatch(views: Sequence[View], share: bool = True) -> Microbatch:
    """Returns the micro-batch of these views. Token t of a response is predicted at the row of the token before it.

    Without views it is one token that no loss looks at, so that a rank with nothing to do can take part in a
    step. Raises ValueError for a view without a prompt: nothing would predict its first token.
    """
    for view in views:
        if not len(view.prompt_ids):
            raise ValueError(
                f"Sample {view.sample_id} has an empty prompt: its first token has no predecessor."
            )
    tree = build([view.input_ids() for view in views] or [[0]], share)
    lengths = [len(view.response_ids_T) for view in views]
    # the last token that the model reads predicts the last of the response
    places_M = [rows[len(rows) - length :] for rows, length in zip(tree.rows, lengths, strict=False)]
    place_H, hidden_row_M = torch.unique(_int64(places_M), sorted=True, return_inverse=True)
    return Microbatch(
        sample_ids=[view.sample_id for view in views],
        ids_S=tree.ids_S,
        positions_S=tree.positions_S,
        cu_seqlens_N1=tree.cu_seqlens_N1,
        parents_N=tree.parents_N,
        place_H=place_H,
        hidden_row_M=hidden_row_M,
        targets_M=_int64([view.response_ids_T for view in views]),
        sample_M=_int64([np.repeat([view.sample_id for view in views], lengths)]),
        index_M=_int64([np.arange(length) for length in lengths]),
    )


class _Run:
    """Sequences in lexicographic order, to be cut into consecutive parts; a part's cost is the size of its
    tree.
    """

    def __init__(self, lengths: list[int], overlaps: list[int]) -> None:
        self._lengths = lengths
        self._overlaps = overlaps
        self._sums = [0, *accumulate(a - b for a, b in zip(lengths, overlaps, strict=True))]

    def cost(self, start: int, end: int) -> int:
        return self._sums[end] - self._sums[start] + self._overlaps[start]

    def cut(self, limit: int) -> list[tuple[int, int]]:
        """Parts [start, end) of at most `limit` tokens, or of one sequence, from left to right."""
        parts: list[tuple[int, int]] = []
        start = 0
        while start < len(self._lengths):
            end = start + 1
            while end < len(self._lengths) and self.cost(start, end + 1) <= limit:
                end += 1
            if end < len(self._lengths):
                ends = [e for e in range(start + 1, end + 1) if self.cost(start, e) >= _FULL_ENOUGH * limit]
                # The last of those where the least is computed again: between problems rather than siblings.
                end = min(reversed(ends), key=self._overlaps.__getitem__, default=end)
            parts.append((start, end))
            start = end
        return parts

    def divide(self, count: int, budget: int) -> list[tuple[int, int]]:
        """`count` parts within the budget, the largest as small as a search finds; fewer if sequences run
        out.
        """
        best, low, high = self.cut(budget), 1, budget
        while low < high:
            middle = (low + high) // 2
            parts = self.cut(middle)
            if len(parts) <= count:
                best, high = parts, middle
            else:
                low = middle + 1
        # By cost, largest first; parts of one sequence cannot be divided and cost nothing here.
        heap = [(-self.cost(*part) if part[1] - part[0] > 1 else 0, part) for part in best]
        heapq.heapify(heap)
        while len(heap) < count and heap[0][0] < 0:
            _, (start, end) = heapq.heappop(heap)
            middle = min(range(start + 1, end), key=lambda m: max(self.cost(start, m), self.cost(m, end)))
            for part in ((start, middle), (middle, end)):
                heapq.heappush(heap, (-self.cost(*part) if part[1] - part[0] > 1 else 0, part))
        return sorted(part for _, part in heap)


def _deal(chunks: list[list[int]], costs: list[int], dp: int) -> list[list[list[int]]]:
    """Largest first, there and back over the ranks, so that their sums are near each other."""
    ranks: list[list[list[int]]] = [[] for _ in range(dp)]
    by_cost = sorted(range(len(chunks)), key=lambda k: (-costs[k], k))
    for place, k in enumerate(by_cost):
        lap, seat = divmod(place, dp)
        ranks[seat if lap % 2 == 0 else dp - 1 - seat].append(chunks[k])
    most = max(len(rank) for rank in ranks)
    return [rank + [[] for _ in range(most - len(rank))] for rank in ranks]


def _int64(parts: Sequence[Sequence[int] | np.ndarray]) -> Tensor:
    """The parts, one after another."""
    none = np.zeros(0, np.int64)
    return torch.from_numpy(np.concatenate([none, *(np.asarray(part, np.int64) for part in parts)]))
