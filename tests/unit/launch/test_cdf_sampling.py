"""Tokens are drawn from the distribution that the server reports log-probabilities of."""

import torch

from sdpo_megatron.launch.cdf_sampling import draw


def test_tokens_come_as_often_as_their_probability():
    torch.manual_seed(0)
    probs_V = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.15, 0.05, 0.0])
    drawn = draw(probs_V.expand(200_000, -1))
    assert drawn.shape == (200_000, 1) and drawn.dtype == torch.int64
    shares_V = torch.bincount(drawn[:, 0], minlength=7) / 200_000
    assert not shares_V[probs_V == 0].any()
    # four standard errors
    assert ((shares_V - probs_V).abs() <= 4 * (probs_V * (1 - probs_V) / 200_000).sqrt()).all()


def test_a_row_is_its_own_and_need_not_add_up_to_one():
    probs_BV = torch.zeros(3, 49_152)
    probs_BV[0, 0] = 1e-30
    probs_BV[1, 49_151] = 7.0
    probs_BV[2, 100] = 0.25
    for _ in range(100):
        assert draw(probs_BV)[:, 0].tolist() == [0, 49_151, 100]


def test_the_largest_random_number_draws_no_token_of_probability_0(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *size, **kind: torch.ones(*size, dtype=torch.float64))
    assert draw(torch.tensor([[0.1, 0.2, 0.7, 0.0, 0.0]])).tolist() == [[2]]


def test_rare_tokens_do_not_drown_in_rounding():
    """Half of the probability lies on 2^20 tokens that a float32 sum behind the first would not see one by one."""
    torch.manual_seed(0)
    probs_V = torch.full((1 + (1 << 20),), 0.5 / (1 << 20))
    probs_V[0] = 0.5
    drawn = draw(probs_V.expand(100, -1))[:, 0]
    assert 25 < int((drawn > 0).sum()) < 75
    assert drawn[drawn > 0].unique().numel() > 24
