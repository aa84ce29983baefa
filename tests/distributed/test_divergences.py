"""Every objective over 1 to 4 ranks that share the vocabulary: equal to float64, and to each other."""

from functools import cache

import pytest

from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed


@cache
def losses(ranks: int) -> list[dict[str, float]]:
    """Of each rank; the processes start once."""
    return run_ranks(ranks, "tests.distributed.divergences:compare")


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_equals_float64(ranks):
    """Losses, the gradient by hidden states summed over the ranks, and by each rank's shard of the head."""
    of_each_rank = losses(ranks)
    assert all(of_one == of_each_rank[0] for of_one in of_each_rank), "every rank has the same loss"


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_number_of_ranks_changes_nothing(ranks):
    whole = losses(1)[0]
    assert len(whole) == 18 * 2 * 2
    assert losses(ranks)[0] == {label: pytest.approx(loss, rel=2e-6) for label, loss in whole.items()}
