"""The canary notices weights that did not arrive, and weights that arrived under another's name."""

import pytest

from tests.ranks import run_ranks


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [{"tp": 1}, {"pp": 2}, {"tp": 3}], ids=["one", "pp2", "tp3"])
def test_a_dropped_bucket_and_swapped_tensors_are_caught(running_server, tiny_model, layout):
    ranks = layout.get("tp", 1) * layout.get("pp", 1)
    said = run_ranks(
        ranks, "tests.e2e.pushing:push_right_and_wrong", str(tiny_model()), running_server, layout
    )[0]
    right, dropped, mended, swapped, mended_again = said
    assert right == mended == mended_again == ""
    assert "push of weights version 1" in dropped
    assert "push of weights version 3" in swapped


@pytest.mark.distributed
def test_another_run_that_pushed_meanwhile_is_named(running_server, tiny_model):
    said = run_ranks(1, "tests.e2e.pushing:push_from_two_runs", str(tiny_model()), running_server)[0]
    first, again, others, ours = said
    assert first == again == others == ""
    assert ours.endswith(
        "has weights that another run pushed (b-2; this run's begin with a): give each run servers of its own."
    )
