"""Quantiles of numbers that lie on several ranks, none of which sees those of the others."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_DIGITS = ((21, 11), (10, 11), (0, 10))
"""Where the three digits of a 32-bit key begin, and how many bits each has: 2,048 counts travel, not the numbers."""
_HALF = 1 << 31


def quantiles(
    values_T: Tensor, at: Sequence[float], total: Callable[[Tensor], Tensor] = lambda counts: counts
) -> list[float]:
    """Returns the quantiles of float32 numbers, between two of them by linear interpolation; of none, an empty list.
    They are those of `torch.quantile`, which takes no more than 2^24 numbers, to the last bit.

    `total` adds up int64 tensors over all ranks that have numbers; all of them call this together."""
    count = int(total(torch.tensor([len(values_T)])))
    if not count:
        return []
    # above 2^24 a float32 may round to behind the last
    places = [torch.tensor(q, dtype=torch.float32) * (count - 1) for q in at]
    lows = [min(int(place.floor()), count - 1) for place in places]
    highs = [min(int(place.ceil()), count - 1) for place in places]
    kth = _order_statistics(values_T, sorted({*lows, *highs}), total)
    return [
        float(torch.lerp(kth[low], kth[high], place - place.floor()))
        for low, high, place in zip(lows, highs, places, strict=True)
    ]


def _order_statistics(
    values_T: Tensor, wanted: Sequence[int], total: Callable[[Tensor], Tensor]
) -> dict[int, Tensor]:
    """Returns the k-th smallest number of all ranks for each k: their keys are found digit by digit, by counting."""
    keys_T = _keys(values_T)
    found = {k: (0, k) for k in wanted}
    """By k: the digits known so far, and how many numbers with these digits come before it."""
    for shift, bits in _DIGITS:
        prefixes = sorted({prefix for prefix, _ in found.values()})
        counts = total(torch.stack([_digit_counts(keys_T, prefix, shift, bits) for prefix in prefixes]))
        sums = counts.cumsum(1)
        for k, (prefix, before) in found.items():
            row = prefixes.index(prefix)
            digit = int(torch.searchsorted(sums[row], before, right=True))
            before -= int(sums[row, digit] - counts[row, digit])
            found[k] = ((prefix << bits) + digit, before)
    return {k: _value(key) for k, (key, _) in found.items()}


def _digit_counts(keys_T: Tensor, prefix: int, shift: int, bits: int) -> Tensor:
    alike_T = keys_T[(keys_T >> (shift + bits)) == prefix]
    return torch.bincount((alike_T >> shift) & ((1 << bits) - 1), minlength=1 << bits)


def _keys(values_T: Tensor) -> Tensor:
    """Returns int64 in [0, 2**32) that are ordered as the numbers are: the bits of a positive float32 are, those of a
    negative one are the other way round."""
    bits_T = values_T.contiguous().view(torch.int32).long()
    return torch.where(bits_T >= 0, bits_T, -_HALF - bits_T - 1) + _HALF


def _value(key: int) -> Tensor:
    bits = key - _HALF
    bits = bits if bits >= 0 else -_HALF - bits - 1
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32)
