"""Quantiles of what lies on several ranks are those of all of it."""

import threading

import pytest
import torch
from torch import Tensor

from sdpo_megatron.algorithm.quantiles import quantiles

AT = [0.0, 0.5, 0.95, 0.99, 1.0]


@pytest.mark.parametrize("count", [1, 2, 3, 100, 4097])
@pytest.mark.parametrize("shift", [0.0, -0.5, -2.0])
def test_they_are_those_of_torch(count: int, shift: float):
    values_T = torch.rand(count, generator=torch.Generator().manual_seed(count)) + shift
    assert quantiles(values_T, AT) == [float(values_T.quantile(q)) for q in AT]


def test_values_that_occur_often_and_extremes():
    values_T = torch.tensor([0.0, -0.0, 1e-45, 1e-45, -3e38, 3e38, 7.0, 7.0, 7.0])
    assert quantiles(values_T, AT) == [float(values_T.quantile(q)) for q in AT]


def test_none_has_none():
    assert quantiles(torch.zeros(0), AT) == []


def test_more_numbers_than_torch_takes():
    values_T = torch.arange((1 << 24) + 8, dtype=torch.float32).div_(1 << 24)
    assert quantiles(values_T, [0.5, 0.99, 1.0]) == pytest.approx([0.5, 0.99, 1.0], abs=1e-6)


def test_each_rank_has_its_own_numbers_and_all_get_the_same():
    values_T = torch.randn(5000, generator=torch.Generator().manual_seed(1))
    parts = [values_T[:0], values_T[:4000], values_T[4000:]]
    meeting, given, found = threading.Barrier(3), [torch.zeros(0)] * 3, [[0.0]] * 3

    def on_rank(rank: int) -> None:
        def total(counts: Tensor) -> Tensor:
            given[rank] = counts
            meeting.wait(10)
            result = sum(given, torch.zeros_like(counts))
            meeting.wait(10)
            return result

        found[rank] = quantiles(parts[rank], AT, total)

    threads = [threading.Thread(target=on_rank, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [[float(values_T.quantile(q)) for q in AT]] * 3
