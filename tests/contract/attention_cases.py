"""Runs in the server's environment and prints, as JSON, what the batched attention makes of many batches beside
SGLang's torch_native, and what it says of what it does not compute."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

LAUNCH = Path(__file__).parents[2] / "sdpo_megatron/launch"
sys.path.insert(0, str(LAUNCH))

import sglang_on_cpu  # noqa: E402  # pyright: ignore[reportMissingImports]

sglang_on_cpu.provide_sgl_kernel()
sglang_on_cpu.provide_torchvision_operators()

import batched_attention as ours  # noqa: E402  # pyright: ignore[reportMissingImports]
import torch  # noqa: E402
from sglang.srt.layers.attention import attention_registry  # noqa: E402  # pyright: ignore[reportMissingImports]
from sglang.srt.layers.radix_attention import (  # noqa: E402  # pyright: ignore[reportMissingImports]
    AttentionType,
    RadixAttention,
)
from sglang.srt.model_executor.forward_batch_info import (  # noqa: E402  # pyright: ignore[reportMissingImports]
    ForwardMode,
)

PLACES = 20_000

BATCHES = {
    # (cached, new) tokens of each sequence
    "one token of each": [(100 + 3 * i % 17, 1) for i in range(128)],
    "new prompts": [(0, 7), (0, 90), (0, 1), (0, 33)],
    "behind prefixes": [(50, 20), (3, 1), (7, 40), (0, 12), (200, 2)],
    "prompts in pieces": [(0, 1500), (700, 300), (5, 1)],
    "none": [],
}
HEADS = {
    "as many": (4, 4, 16, 16),
    "grouped": (9, 3, 64, 64),
    "one": (6, 1, 24, 24),
    "two sizes": (4, 2, 24, 8),
}


class Pool:
    """A cache of which nothing is defined that was not written."""

    def __init__(self, K: int, D: int, value_D: int, dtype: torch.dtype):
        self.k_SKD = torch.full((PLACES, K, D), torch.nan, dtype=dtype)
        self.v_SKD = torch.full((PLACES, K, value_D), torch.nan, dtype=dtype)

    def set_kv_buffer(self, layer, where, k, v) -> None:
        self.k_SKD[where.loc], self.v_SKD[where.loc] = k, v

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        return self.k_SKD

    def get_value_buffer(self, layer_id: int) -> torch.Tensor:
        return self.v_SKD


def runner(pool=None, slots_RC=None, model=None, dtype=torch.float32, **others) -> SimpleNamespace:
    settings = {"use_mla_backend": False, "page_size": 1, "device": "cpu", "dtype": dtype}
    settings["spec_algorithm"] = SimpleNamespace(is_some=lambda: False)
    return SimpleNamespace(
        token_to_kv_pool=pool,
        req_to_token_pool=SimpleNamespace(req_to_token=slots_RC),
        model=model or torch.nn.Module(),
        **(settings | others),
    )


def difference(
    batch: list[tuple[int, int]], heads: tuple[int, int, int, int], dtype: torch.dtype, window: int = -1
) -> float:
    """The largest of the outputs of both backends, each through SGLang's own entry with a cache of its own."""
    torch.manual_seed(0)
    (H, K, D, value_D), N = heads, len(batch)
    T = sum(new for _, new in batch)
    layer = RadixAttention(H, D, D**-0.5, K, layer_id=0, v_head_dim=value_D, sliding_window_size=window)
    # places in any order, requests too; no place is used twice
    slots_RC = torch.randperm(PLACES)[: max(1, N) * (PLACES // max(1, N))].view(max(1, N), -1).int()
    requests_N = torch.randperm(N)
    decode = N > 0 and all(new == 1 for _, new in batch)
    seen_N = torch.tensor([cached + new for cached, new in batch], dtype=torch.int64)
    rows = [slots_RC[r, c : c + n].long() for r, (c, n) in zip(requests_N.tolist(), batch, strict=True)]
    forward = SimpleNamespace(
        forward_mode=ForwardMode.DECODE if decode else ForwardMode.EXTEND if N else ForwardMode.IDLE,
        req_pool_indices=requests_N,
        seq_lens=seen_N,
        extend_prefix_lens=torch.tensor([cached for cached, _ in batch], dtype=torch.int32),
        extend_seq_lens=torch.tensor([new for _, new in batch], dtype=torch.int32),
        out_cache_loc=torch.cat([*rows, torch.empty(0, dtype=torch.int64)]),
        encoder_lens=None,
    )
    cached_k = torch.randn(PLACES, K, D).to(dtype)
    cached_v = torch.randn(PLACES, K, value_D).to(dtype)
    q, k, v = (torch.randn(T, *size).to(dtype) for size in ((H * D,), (K, D), (K, value_D)))
    outputs = []
    for name in ("torch_native", ours.NAME):
        pool = Pool(K, D, value_D, dtype)
        for r, (cached, _) in zip(requests_N.tolist(), batch, strict=True):
            old = slots_RC[r, :cached].long()
            pool.k_SKD[old], pool.v_SKD[old] = cached_k[old], cached_v[old]
        backend = attention_registry.ATTENTION_BACKENDS[name](runner(pool, slots_RC, dtype=dtype))
        backend.init_forward_metadata(forward)
        outputs.append(backend.forward(q, k, v, layer, forward))
    assert outputs[0].shape == outputs[1].shape == (T, H * value_D)
    return (outputs[0] - outputs[1]).abs().max().item() if T else 0.0


def refusals() -> dict[str, str]:
    layers = {
        "cross": RadixAttention(4, 16, 1.0, 2, layer_id=0, is_cross_attention=True),
        "encoder": RadixAttention(4, 16, 1.0, 2, layer_id=0, attn_type=AttentionType.ENCODER_ONLY),
        "capped": RadixAttention(4, 16, 1.0, 2, layer_id=0, logit_cap=30.0),
    }
    runners = {name: runner(model=torch.nn.ModuleDict({"attn": layer})) for name, layer in layers.items()}
    runners["mla"] = runner(use_mla_backend=True)
    runners["pages"] = runner(page_size=16)
    runners["forgetful"] = runner(pool=object.__new__(ours.SWAKVPool))
    runners["speculative"] = runner(spec_algorithm=SimpleNamespace(is_some=lambda: True))
    found = {}
    for name, one in runners.items():
        try:
            ours.BatchedAttention(one)
        except NotImplementedError as error:
            found[name] = str(error)
    return found


def other_interface() -> str:
    ours.INTERFACES = ((ours.KVWriteLoc, ("loc", "swa_loc", "page")),)
    try:
        ours.register()
    except SystemExit as end:
        return str(end)
    return ""


def pieces() -> dict[str, int]:
    """Sizes of what a long prompt beside short ones is cut into."""
    parts = ours.packed(ours.spans([0, 30_000, *[0] * 40], [32_000, 500, *[20] * 40]))
    return {
        "scores": max(len(part) * part[0].length * max(s.seen for s in part) for part in parts),
        "positions of several": max(
            (len(part) * max(s.seen for s in part) for part in parts if len(part) > 1), default=0
        ),
        "tokens": sum(span.length for part in parts for span in part),
        "pieces": len(parts),
    }


def drawn() -> list[int]:
    """What SGLang's sampler draws, in its own form, where a row has one possible token."""
    import plain_parts  # pyright: ignore[reportMissingImports]
    from sglang.srt.layers import sampler  # pyright: ignore[reportMissingImports]

    before = sampler.sampling_from_probs_torch
    plain_parts.register_sampling()
    assert sampler.sampling_from_probs_torch is not before
    probs_BV = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 2.0]])
    found, wanted = sampler.sampling_from_probs_torch(probs_BV), before(probs_BV)
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    return found.tolist()


def main() -> None:
    ours.register()
    torch.set_grad_enabled(False)
    # prompts of a test's length in pieces too
    full, ours.PIECE_SCORES = ours.PIECE_SCORES, 2**17
    differences = {
        f"{dtype}, {heads}, {batch}": difference(BATCHES[batch], HEADS[heads], dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for heads in HEADS
        for batch in BATCHES
    }
    differences |= {
        f"{torch.float32}, window {window}, {batch}": difference(
            BATCHES[batch], HEADS["grouped"], torch.float32, window
        )
        for window in (0, 5, 130)
        for batch in BATCHES
    }
    ours.PIECE_SCORES = full
    report = {"differences": differences, "pieces": pieces(), "refusals": refusals()}
    print("REPORT " + json.dumps(report | {"other interface": other_interface(), "drawn": drawn()}))


main()
