"""How weights are cut into buckets, and what their checksum notices. The push itself: tests/e2e."""

import pytest
import torch

from sdpo_megatron.serving.push import checksum, plan_buckets

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


def test_the_checksum_depends_on_bytes_and_order():
    flat = torch.randint(0, 256, (1_234_567,), dtype=torch.uint8)
    assert checksum(flat) == checksum(flat.clone())
    changed = flat.clone()
    changed[-1] ^= 1
    assert checksum(changed) != checksum(flat)
    assert checksum(flat.roll(4)) != checksum(flat)
    words = torch.arange(3_000_000, dtype=torch.int32)
    swapped = words.clone()
    swapped[0], swapped[2_500_000] = words[2_500_000], words[0]
    assert checksum(swapped.view(torch.uint8)) != checksum(words.view(torch.uint8))
