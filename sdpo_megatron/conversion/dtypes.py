"""Weights in another type, and what that loses."""

import math

import torch
from torch import Tensor

from sdpo_megatron.errors import UserError


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Rounding:
    """Brings weights to a type, or leaves them as they are, and counts what that changed."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self.weights = self.changed = 0

    def of(self, stored: torch.dtype) -> torch.dtype:
        """Returns the type that weights stored as `stored` get."""
        return stored if self.dtype is None else self.dtype

    def loss(self, stored: torch.dtype) -> str:
        """Returns in words what is lost of weights that are `stored` so; nothing where nothing is."""
        wanted = self.of(stored)
        if torch.promote_types(stored, wanted) == wanted:
            return ""
        before, after = torch.finfo(stored), torch.finfo(wanted)
        lost = []
        if after.eps > before.eps:
            lost.append(f"rounds each to {_bits(after)} of its {_bits(before)} significant bits")
        if after.max < before.max / 2:
            lost.append(
                f"cannot hold numbers above {after.max:g}, and none but 0 below {after.smallest_normal * after.eps:g}"
            )
        return f"the weights are {named(stored)}: {named(wanted)} {' and '.join(lost)}."

    def apply(self, tensor: Tensor, name: str) -> Tensor:
        """Returns `tensor` in its type. Raises UserError where that makes numbers infinite; `name` says whose."""
        self.weights += tensor.numel()
        wanted = self.of(tensor.dtype)
        if wanted == tensor.dtype:
            return tensor
        result = tensor.to(wanted)
        # rows that only fill up a vocabulary are none of the tensor's
        if tensor.numel() and self.loss(tensor.dtype):
            back = result.to(tensor.dtype)
            # a NaN stays one
            self.changed += int(((back != tensor) & ~tensor.isnan()).sum())
            if not math.isfinite(float(back.abs().max())) and (lost := _overflown(tensor, back)):
                raise UserError(
                    f"{name} has {lost} numbers of {tensor.numel()} that {named(wanted)} cannot hold: its largest is "
                    f"{torch.finfo(wanted).max:g}; take another --dtype."
                )
        return result


def _overflown(tensor: Tensor, back: Tensor) -> int:
    return int((tensor.isfinite() & ~back.isfinite()).sum())


def _bits(of: torch.finfo) -> int:
    return 1 - round(math.log2(of.eps))
