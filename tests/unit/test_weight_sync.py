"""How weights are cut into buckets, and what their checksum notices. The push itself: tests/e2e."""

import pytest
import torch

from sdpo_megatron.errors import RunFailed
from sdpo_megatron.weight_sync import Canary, checksum, plan_buckets

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


class FakeScorer:
    def __init__(self, *logprobs):
        self.logprobs = list(logprobs or (-1.0, -2.0, -3.0))

    def response_logprobs(self, pairs):
        ((prompt, response),) = pairs
        assert prompt == [7]
        return [self.logprobs]


class FakeServer:
    url = "http://127.0.0.1:1"

    def __init__(self, logprobs):
        self.logprobs = logprobs

    def prompt_logprobs(self, ids):
        return self.logprobs


def test_the_canary_measures_the_largest_gap():
    canary = Canary([7, 1, 2, 3], FakeScorer(), [FakeServer([-1.0, -2.001, -3.0])], tolerance=0.002)  # type: ignore[arg-type,list-item]
    assert canary.check(4) == pytest.approx(0.001)


@pytest.mark.parametrize("wrong", [-2.5, float("nan")])
def test_the_canary_names_version_and_worst_token(wrong):
    servers = [FakeServer([-1.0, -2.0, -3.0]), FakeServer([-1.0, wrong, -3.0])]
    canary = Canary([7, 1, 2, 3], FakeScorer(), servers, tolerance=0.002)  # type: ignore[arg-type]
    with pytest.raises(RunFailed, match=r"weights version 4, .* gives token 2 of the canary \(id 2\)"):
        canary.check(4)


def test_the_canary_names_a_policy_that_is_broken_itself():
    canary = Canary([7, 1], FakeScorer(float("nan")), [FakeServer([float("nan")])], tolerance=0.002)  # type: ignore[arg-type,list-item]
    with pytest.raises(RunFailed, match=r"weights version 4 gives log-probabilities that are not finite"):
        canary.check(4)
