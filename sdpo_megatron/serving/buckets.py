"""How a stage's weights are cut for a push: buckets of bounded size, of consecutive tensors."""

from collections.abc import Sequence
from typing import TypedDict

import torch


class Bucket(TypedDict):
    """What a server must know of one bucket before its bytes arrive."""

    names: list[str]
    shapes: list[list[int]]


def plan_buckets(layout: Sequence[tuple[str, list[int]]], limit_bytes: int, item_bytes: int) -> list[Bucket]:
    """Puts consecutive tensors together up to `limit_bytes`; a larger tensor gets a bucket of its own."""
    buckets: list[Bucket] = []
    room = 0
    for name, shape in layout:
        size = torch.Size(shape).numel() * item_bytes
        if size > room:
            buckets.append(Bucket(names=[], shapes=[]))
            room = limit_bytes
        buckets[-1]["names"].append(name)
        buckets[-1]["shapes"].append(shape)
        room -= size
    return buckets
