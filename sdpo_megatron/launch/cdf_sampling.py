"""How SGLang draws tokens on a CPU: by inverting the distribution function, one random number a row.

`torch.multinomial` draws one for each token of the vocabulary, on one core: it takes 126 ms for 128 responses and a
vocabulary of 49,152, this 37. It imports nothing of sdpo_megatron: it runs in the server's environment.
"""

import inspect
from typing import Any

import torch

EXPECTED = ("probs", "sampling_seed", "positions")


def draw(probs_BV: torch.Tensor) -> torch.Tensor:
    """Returns a token of each row's distribution, int64 [B, 1]; never one of probability 0. Rows need not add up to 1.

    The sums are float64: in float32 the rare ones of many tokens would drown in their rounding."""
    up_to_BV = probs_BV.cumsum(-1, dtype=torch.float64)
    # below the whole sum: a float64 in [0, 1) times a positive number rounds to that number at most, and is cut there
    whole_B1 = up_to_BV[:, -1:]
    drawn_B1 = torch.rand(whole_B1.shape, dtype=torch.float64, device=probs_BV.device) * whole_B1
    below_B1 = torch.nextafter(whole_B1, torch.zeros_like(whole_B1))
    return torch.searchsorted(up_to_BV, torch.minimum(drawn_B1, below_B1), right=True)


def register() -> None:
    """Has SGLang's sampler draw so in this process. Raises SystemExit, in one line, for an SGLang of another
    interface."""
    from sglang.srt.layers import sampler  # pyright: ignore[reportMissingImports]

    original = sampler.sampling_from_probs_torch
    found = tuple(inspect.signature(original).parameters)
    if found != EXPECTED:
        raise SystemExit(
            f"error: sglang's sampling_from_probs_torch takes {', '.join(found)}, and cdf_sampling.py relies on "
            f"{', '.join(EXPECTED)}: install the version that sglang_on_cpu.py names"
        )

    def sampling_from_probs(
        probs: torch.Tensor, sampling_seed: Any = None, positions: Any = None
    ) -> torch.Tensor:
        if sampling_seed is not None:
            return original(probs, sampling_seed=sampling_seed, positions=positions)
        return draw(probs)[:, 0].to(torch.int32)

    sampler.sampling_from_probs_torch = sampling_from_probs
