"""Weights that live on the host between a teacher's passes: on a CPU, a visit is a copy that is gone afterwards."""

import contextlib

import torch
from torch import nn

from sdpo_megatron.trainer.teacher import VisitingWeights

CPU = torch.device("cpu")


def places(chunks: list[nn.Module]) -> list[int]:
    return [parameter.data_ptr() for chunk in chunks for parameter in chunk.parameters()]


def values(chunks: list[nn.Module]) -> list[list[float]]:
    return [parameter.flatten().tolist() for chunk in chunks for parameter in chunk.parameters()]


def test_offloaded_weights_visit_and_go_home():
    chunks: list[nn.Module] = [nn.Linear(3, 2), nn.Linear(3, 2)]
    home, wanted = places(chunks), values(chunks)
    weights = VisitingWeights(chunks, CPU, offload=True)
    for _ in range(2):
        with weights.on_device() as here:
            assert here is chunks and values(here) == wanted
            assert not set(places(here)) & set(home)
        assert places(chunks) == home and values(chunks) == wanted


def test_they_go_home_after_a_failure_too():
    chunks: list[nn.Module] = [nn.Linear(3, 2)]
    home = places(chunks)
    with contextlib.suppress(KeyError), VisitingWeights(chunks, CPU, offload=True).on_device():
        raise KeyError
    assert places(chunks) == home


def test_without_offload_they_stay():
    chunks: list[nn.Module] = [nn.Linear(3, 2)]
    home = places(chunks)
    with VisitingWeights(chunks, CPU, offload=False).on_device() as here:
        assert places(here) == home
