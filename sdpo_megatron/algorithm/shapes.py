"""Shapes of tensors, checked by the axis letters in their names (the legend is in `records.py`)."""

from torch import Tensor


def expect_shapes(**tensors: Tensor | None) -> None:
    """Raises a ValueError unless the tensors' axes have the sizes that their names promise.

    The letters behind the last underscore of a keyword are the tensor's axes in order: `hidden_UD` has the axes U and
    D. Each letter must stand for one size in all tensors; None is passed over. No number is read, so a tensor on a GPU
    is not waited for.
    """
    sizes: dict[str, tuple[int, str]] = {}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        axes = name.rpartition("_")[2]
        if tensor.dim() != len(axes):
            raise ValueError(f"{name} must have {len(axes)} axes, {axes}; its shape is {list(tensor.shape)}")
        for axis, size in zip(axes, tensor.shape, strict=True):
            first_size, first_name = sizes.setdefault(axis, (size, name))
            if size != first_size:
                raise ValueError(f"{axis} is {size} in {name} but {first_size} in {first_name}")
