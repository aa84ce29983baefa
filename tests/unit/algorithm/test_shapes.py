"""Axis letters in names against the tensors' shapes."""

import pytest
import torch

from sdpo_megatron.algorithm.shapes import expect_shapes


def test_each_letter_stands_for_one_size():
    expect_shapes(
        hidden_UD=torch.zeros(3, 4), target_U=torch.zeros(3), head_VD=torch.zeros(5, 4), loss_=torch.zeros(())
    )
    with pytest.raises(ValueError, match="^U is 4 in target_U but 3 in hidden_UD$"):
        expect_shapes(hidden_UD=torch.zeros(3, 4), target_U=torch.zeros(4))
    with pytest.raises(ValueError, match="^D is 6 in head_VD but 4 in hidden_UD$"):
        expect_shapes(hidden_UD=torch.zeros(3, 4), target_U=None, head_VD=torch.zeros(5, 6))
    with pytest.raises(ValueError, match="^D is 2 in x_DD but 1 in x_DD$"):
        expect_shapes(x_DD=torch.zeros(1, 2))


def test_there_is_an_axis_for_each_letter():
    with pytest.raises(ValueError, match=r"^target_U must have 1 axes, U; its shape is \[3, 1\]$"):
        expect_shapes(hidden_UD=torch.zeros(3, 4), target_U=torch.zeros(3, 1))
