"""Tokens are drawn from the distribution that the server reports log-probabilities of. How SGLang chooses experts on a
CPU, with a stand-in for its module; the real one: tests/e2e/test_real_server.py."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from sdpo_megatron.launch import plain_parts
from sdpo_megatron.launch.plain_parts import draw


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


def plain(hidden_states, gating_output, topk, renormalize, correction_bias=None, scoring_func="softmax"):
    return hidden_states, gating_output, topk, renormalize, correction_bias, scoring_func


@pytest.fixture
def topk(monkeypatch: pytest.MonkeyPatch) -> Any:
    names = ("sglang", "sglang.srt", "sglang.srt.layers", "sglang.srt.layers.moe")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module: Any = ModuleType("sglang.srt.layers.moe.topk")
    module.fused_topk_torch_native, module.fused_topk = plain, None
    sys.modules[names[-1]].topk = module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


ASKED = {"hidden_states": 1, "gating_output": 2, "topk": 3, "renormalize": True}
BESIDE = {"num_fused_shared_experts": 0, "routed_scaling_factor": None}


def test_it_is_the_plain_definition(topk: Any):
    plain_parts.register_expert_choice()
    assert topk.fused_topk(**ASKED, **BESIDE) == (1, 2, 3, True, None, "softmax")


@pytest.mark.parametrize("other", [{"routed_scaling_factor": 2.5}, {"packed_out": None}])
def test_what_it_does_not_compute_with_is_said(topk: Any, other: dict[str, Any]):
    plain_parts.register_expert_choice()
    with pytest.raises(NotImplementedError, match=f"does not compute with .*{next(iter(other))}"):
        topk.fused_topk(**ASKED, **BESIDE | other)


def test_another_interface_is_refused(topk: Any):
    topk.fused_topk_torch_native = lambda hidden_states, topk: None
    with pytest.raises(
        SystemExit, match="takes hidden_states, topk, and plain_parts.py relies on hidden_states, g"
    ):
        plain_parts.register_expert_choice()
