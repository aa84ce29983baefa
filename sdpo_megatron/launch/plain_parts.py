"""What SGLang computes in plain torch on a CPU, where it would call a kernel or be slow: how it draws tokens, and how
it chooses a token's experts. It imports nothing of sdpo_megatron: it runs in the server's environment.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch

SAMPLING_TAKES = ("probs", "sampling_seed", "positions")
CHOICE_TAKES = ("hidden_states", "gating_output", "topk", "renormalize", "correction_bias", "scoring_func")
CHOICE_LEAVES_OUT = (
    "num_fused_shared_experts",
    "routed_scaling_factor",
    "apply_routed_scaling_factor_on_output",
)
"""What else SGLang says, which means nothing for the models that are trained here: 0, None or false."""


def draw(probs_BV: torch.Tensor) -> torch.Tensor:
    """Returns a token of each row's distribution, int64 [B, 1]; never one of probability 0. Rows need not add up to 1.

    It inverts the distribution function, one random number a row. `torch.multinomial` draws one for each token of the
    vocabulary, on one core: it takes 126 ms for 128 responses and a vocabulary of 49,152, this 37. The sums are
    float64: in float32 the rare ones of many tokens would drown in their rounding."""
    up_to_BV = probs_BV.cumsum(-1, dtype=torch.float64)
    # below the whole sum: a float64 in [0, 1) times a positive number rounds to that number at most, and is cut there
    whole_B1 = up_to_BV[:, -1:]
    drawn_B1 = torch.rand(whole_B1.shape, dtype=torch.float64, device=probs_BV.device) * whole_B1
    below_B1 = torch.nextafter(whole_B1, torch.zeros_like(whole_B1))
    return torch.searchsorted(up_to_BV, torch.minimum(drawn_B1, below_B1), right=True)


def register_sampling() -> None:
    """Has SGLang's sampler draw so in this process. Raises SystemExit as `check_parameters` does."""
    from sglang.srt.layers import sampler  # pyright: ignore[reportMissingImports]

    original = sampler.sampling_from_probs_torch
    check_parameters(original, SAMPLING_TAKES)

    def sampling_from_probs(
        probs: torch.Tensor, sampling_seed: Any = None, positions: Any = None
    ) -> torch.Tensor:
        if sampling_seed is not None:
            return original(probs, sampling_seed=sampling_seed, positions=positions)
        return draw(probs)[:, 0].to(torch.int32)

    sampler.sampling_from_probs_torch = sampling_from_probs


def register_expert_choice() -> None:
    """Has SGLang choose experts by its own plain definition. Raises SystemExit as `check_parameters` does."""
    from sglang.srt.layers.moe import topk  # pyright: ignore[reportMissingImports]

    plain = topk.fused_topk_torch_native
    check_parameters(plain, CHOICE_TAKES)

    def fused_topk(**arguments: Any) -> Any:
        used = {name: value for name, value in arguments.items() if name in CHOICE_TAKES}
        others = {name: value for name, value in arguments.items() if name not in CHOICE_TAKES}
        if others.keys() - set(CHOICE_LEAVES_OUT) or any(others.values()):
            raise NotImplementedError(f"plain_parts.py does not compute with {others}")
        return plain(**used)

    topk.fused_topk = fused_topk


def check_parameters(function: Callable[..., Any], expected: tuple[str, ...]) -> None:
    """Raises SystemExit, in one line, for an SGLang whose `function` takes others."""
    found = tuple(inspect.signature(function).parameters)
    if found != expected:
        raise SystemExit(
            f"error: sglang's {function.__name__} takes {', '.join(found)}, and plain_parts.py relies on "
            f"{', '.join(expected)}: install the version that sglang_on_cpu.py names"
        )
