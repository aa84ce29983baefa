"""What only rank 0 can find out ends every rank alike."""

from tests.ranks import run_ranks


def test_every_rank_raises_what_rank_0_did():
    first, second = run_ranks(2, "tests.distributed.parallel:on_main")
    assert first == ["user mend\\nthis", "run the end", 7]
    assert second == ["user mend\\nthis", "run the end", None]
