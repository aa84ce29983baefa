"""The kernel over 1, 2 and 3 ranks, padded vocabulary, in chunks and at once, against float64."""

import pytest

from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_equals_the_dense_definition(ranks: int, chunk_tokens: int, temperature: float) -> None:
    run_ranks(ranks, "tests.distributed.kernel:compare", temperature, chunk_tokens)
