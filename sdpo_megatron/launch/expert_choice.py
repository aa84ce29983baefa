"""How SGLang chooses a token's experts on a CPU: by its own plain definition, where it would call a kernel.

It imports nothing of sdpo_megatron: it runs in the server's environment.
"""

import inspect
from typing import Any

EXPECTED = ("hidden_states", "gating_output", "topk", "renormalize", "correction_bias", "scoring_func")
UNUSED = ("num_fused_shared_experts", "routed_scaling_factor", "apply_routed_scaling_factor_on_output")
"""What else SGLang says, which means nothing for the models that are trained here: 0, None or false."""


def register() -> None:
    """Has SGLang choose so in this process. Raises SystemExit, in one line, for an SGLang of another interface."""
    from sglang.srt.layers.moe import topk  # pyright: ignore[reportMissingImports]

    plain = topk.fused_topk_torch_native
    found = tuple(inspect.signature(plain).parameters)
    if found != EXPECTED or not hasattr(topk, "fused_topk"):
        raise SystemExit(
            f"error: sglang's fused_topk_torch_native takes {', '.join(found)}, and expert_choice.py relies on "
            f"{', '.join(EXPECTED)}: install the version that sglang_on_cpu.py names"
        )

    def fused_topk(**arguments: Any) -> Any:
        used = {name: value for name, value in arguments.items() if name in EXPECTED}
        others = {name: value for name, value in arguments.items() if name not in EXPECTED}
        if others.keys() - set(UNUSED) or any(others.values()):
            raise NotImplementedError(f"expert_choice.py does not compute with {others}")
        return plain(**used)

    topk.fused_topk = fused_topk
