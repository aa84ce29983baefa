"""How SGLang chooses experts on a CPU, with a stand-in for its module; the real one: tests/e2e/test_real_server.py."""

import sys
from types import ModuleType
from typing import Any

import pytest

from sdpo_megatron.launch import expert_choice


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
    expert_choice.register()
    assert topk.fused_topk(**ASKED, **BESIDE) == (1, 2, 3, True, None, "softmax")


@pytest.mark.parametrize("other", [{"routed_scaling_factor": 2.5}, {"packed_out": None}])
def test_what_it_does_not_compute_with_is_said(topk: Any, other: dict[str, Any]):
    expert_choice.register()
    with pytest.raises(NotImplementedError, match=f"does not compute with .*{next(iter(other))}"):
        topk.fused_topk(**ASKED, **BESIDE | other)


def test_another_interface_is_refused(topk: Any):
    topk.fused_topk_torch_native = lambda hidden_states, topk: None
    with pytest.raises(
        SystemExit, match="takes hidden_states, topk, and expert_choice.py relies on hidden_states, g"
    ):
        expert_choice.register()
