"""What the canary notices."""

import pytest

from sdpo_megatron.errors import RunFailed
from sdpo_megatron.serving.canary import Canary


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
