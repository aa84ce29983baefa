"""What another type loses of weights is said, counted, or refused."""

import pytest
import torch

from sdpo_megatron.conversion.dtypes import Rounding
from sdpo_megatron.errors import UserError


@pytest.mark.parametrize(
    ("stored", "wanted", "said"),
    [
        (
            torch.float32,
            torch.bfloat16,
            "the weights are float32: bfloat16 rounds each to 8 of its 24 significant bits.",
        ),
        (
            torch.bfloat16,
            torch.float16,
            "the weights are bfloat16: float16 cannot hold numbers above 65504, and none but 0 below 5.96046e-08.",
        ),
        (
            torch.float32,
            torch.float16,
            "the weights are float32: float16 rounds each to 11 of its 24 significant bits and cannot hold numbers "
            "above 65504, and none but 0 below 5.96046e-08.",
        ),
        (torch.bfloat16, torch.float32, ""),
        (torch.float16, torch.float32, ""),
        (torch.float32, torch.float32, ""),
        (torch.float32, None, ""),
    ],
)
def test_the_loss_in_words(stored, wanted, said):
    assert Rounding(wanted).loss(stored) == said


def test_only_what_changed_is_counted():
    rounding = Rounding(torch.bfloat16)
    result = rounding.apply(torch.tensor([1.0, 1.0 + 2**-12, float("nan"), -3.0, float("inf")]), "w")
    assert result.dtype == torch.bfloat16 and result[0] == result[1] == 1.0
    assert (rounding.changed, rounding.weights) == (1, 5)


def test_what_stays_is_not_copied():
    tensor = torch.ones(3)
    assert Rounding(None).apply(tensor, "w") is tensor
    assert Rounding(torch.float32).apply(tensor, "w") is tensor


def test_no_numbers_are_in_another_type_too():
    """Of a vocabulary's rows that fill it up, none is read."""
    rounding = Rounding(torch.bfloat16)
    result = rounding.apply(torch.empty(0, 4), "w")
    assert (result.dtype, result.shape, rounding.changed) == (torch.bfloat16, (0, 4), 0)


def test_numbers_that_would_become_infinite_are_refused():
    with pytest.raises(UserError) as caught:
        Rounding(torch.float16).apply(torch.tensor([1.0, 7e4, -7e4, float("inf")]), "model.norm.weight")
    assert str(caught.value) == (
        "model.norm.weight has 2 numbers of 4 that float16 cannot hold: its largest is 65504; take another --dtype."
    )
