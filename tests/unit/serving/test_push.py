"""How weights are cut into buckets, and where the group is met. The push itself: tests/e2e."""

import pytest

from sdpo_megatron.errors import UserError
from sdpo_megatron.serving import weight_group
from sdpo_megatron.serving.push import plan_buckets
from sdpo_megatron.serving.weight_group import own_address

LAYOUT = [("a", [10]), ("b", [5, 2]), ("c", [100]), ("d", [1])]


@pytest.mark.parametrize(
    ("limit", "names"),
    [
        (1, [["a"], ["b"], ["c"], ["d"]]),
        (80, [["a", "b"], ["c"], ["d"]]),
        (400, [["a", "b"], ["c"], ["d"]]),
        (404, [["a", "b"], ["c", "d"]]),
        (10_000, [["a", "b", "c", "d"]]),
    ],
)
def test_buckets_are_bounded_and_keep_the_order(limit, names):
    buckets = plan_buckets(LAYOUT, limit, item_bytes=4)
    assert [bucket["names"] for bucket in buckets] == names
    assert [shape for bucket in buckets for shape in bucket["shapes"]] == [shape for _, shape in LAYOUT]


def test_the_weight_group_is_met_where_all_servers_reach_it(monkeypatch):
    routes = {
        "127.0.0.1": "127.0.0.1",
        "10.1.0.5": "10.1.0.2",
        "10.1.0.6": "10.1.0.2",
        "10.9.0.5": "10.9.0.2",
    }
    monkeypatch.setattr(weight_group, "_route", routes.__getitem__)
    assert own_address(["127.0.0.1", "127.0.0.1"]) == "127.0.0.1"
    assert own_address(["127.0.0.1", "10.1.0.5", "10.1.0.6"]) == "10.1.0.2"
    with pytest.raises(
        UserError, match=r"several networks \(10.1.0.5 from 10.1.0.2, 10.9.0.5 from 10.9.0.2\)"
    ):
        own_address(["10.1.0.5", "127.0.0.1", "10.9.0.5"])
