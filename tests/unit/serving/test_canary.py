"""What the canary notices, and what it takes for rounding."""

import json

import pytest
import torch

from sdpo_megatron.errors import PolicyBroken, RunFailed
from sdpo_megatron.serving.calls import Calls
from sdpo_megatron.serving.canary import Canary, Noise, kept_noise
from sdpo_megatron.stopping import StopRequest

TOKENS = 64
NOISE = Noise(mean=0.03, high=0.1)


class FakeScorer:
    def __init__(self, *logprobs):
        self.logprobs = list(logprobs or [-2.0] * TOKENS)

    def response_logprobs(self, pairs):
        ((prompt, _),) = pairs
        assert prompt == [7]
        return [self.logprobs]


class FakeServer:
    url = "http://127.0.0.1:1"

    def __init__(self, gaps):
        self.gaps = gaps

    def prompt_logprobs(self, ids):
        return [-2.0 + gap for gap in self.gaps]


class OneRank:
    is_main = True

    def share(self, value):
        return value


def canary(*gaps_of_servers, scorer=None, noise=NOISE):
    said: list[str] = []
    servers = [FakeServer(gaps) for gaps in gaps_of_servers]
    ids = [7, *range(TOKENS)]
    calls = Calls(StopRequest())
    return Canary(ids, scorer or FakeScorer(), calls, servers, noise, 4.0, said.append), said  # type: ignore[arg-type]


def test_the_largest_difference_of_all_servers_is_measured():
    watch, _ = canary([0.01] * TOKENS, [-0.02] * (TOKENS - 8) + [0.2] * 8)
    gap = watch.check(4, strict=True)
    assert gap.mean == pytest.approx((0.02 * 56 + 0.2 * 8) / 64) and gap.high == pytest.approx(0.2)


def test_one_token_far_off_is_rounding():
    """The worst token of two right computations in bfloat16 differed by 0.64 where the mean was 0.03."""
    watch, said = canary([0.03] * (TOKENS - 1) + [0.64])
    watch.check(4, strict=True)
    assert not said


@pytest.mark.parametrize("wrong", [[0.2] * TOKENS, [0.0] * 57 + [0.5] * 7, [float("nan")] * TOKENS])
def test_a_wrong_server_is_named_with_all_figures(wrong):
    watch, _ = canary([0.01] * TOKENS, wrong)
    with pytest.raises(
        RunFailed, match=r"weights version 4, .* makes 0.03 and 0.1, of which 4 times are allowed"
    ):
        watch.check(4, strict=True)


def test_what_is_known_to_hold_the_weights_is_warned_about_only():
    watch, said = canary([0.2] * TOKENS)
    watch.check(4, strict=False)
    assert len(said) == 1 and "rounding has grown" in said[0]


def test_the_canary_names_a_policy_that_is_broken_itself():
    watch, _ = canary([0.0] * TOKENS, scorer=FakeScorer(*[float("nan")] * TOKENS))
    with pytest.raises(PolicyBroken, match=r"weights version 4 gives log-probabilities that are not finite"):
        watch.check(4, strict=True)


def test_the_noise_is_measured_once_a_run(tmp_path):
    path, measured = tmp_path / "rounding.json", []

    def measure():
        measured.append(1)
        return NOISE

    for _ in range(2):
        assert kept_noise(path, measure, OneRank()) == NOISE  # type: ignore[arg-type]
    assert len(measured) == 1 and json.loads(path.read_text()) == {"mean": 0.03, "high": 0.1}
    path.write_text('{"mean": ')
    assert kept_noise(path, measure, OneRank()) == NOISE and len(measured) == 2  # type: ignore[arg-type]


def test_noise_is_of_absolute_differences():
    a_T = torch.zeros(10).tolist()
    assert Noise.between(a_T, [-1.0] + [0.0] * 9) == Noise(0.1, 1.0)
    assert Noise.between([float("-inf")], [float("-inf")]).mean == float("inf")
