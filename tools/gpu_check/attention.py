"""Attention over token trees: scaled_dot_product_attention block by block, as the trainer does it, beside FlexAttention
with one block mask; both against plain attention in float32, of the first key-value head.

TFLOP/s count the pairs of tokens that see each other: 4 operations a pair and head dimension forward, 10 backward."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from sdpo_megatron.algorithm.token_tree import TokenTree, build
from sdpo_megatron.trainer.attention import TreeAttention, tree_params
from tools.gpu_check.machine import Machine, Row, attempt

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
ERROR = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
"""The bound of the mean error, relative to the mean size: bfloat16 has 8 binary digits."""


@dataclass(frozen=True)
class Layout:
    problems: int
    prompt: int
    responses: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.problems} x (prompt {self.prompt} + {self.responses} x {self.tokens})"

    def tree(self) -> TokenTree:
        torch.manual_seed(0)
        sequences = []
        for _ in range(self.problems):
            prompt = torch.randint(1000, (self.prompt,)).tolist()
            for _ in range(self.responses):
                sequences.append(prompt + torch.randint(1000, (self.tokens,)).tolist())
        return build(sequences, share=True)


LAYOUTS = (Layout(1, 1024, 8, 2048), Layout(16, 96, 8, 12))
SMALL = (Layout(1, 20, 3, 30), Layout(3, 9, 2, 4))
WINDOW, SMALL_WINDOW = 512, 12
"""Tokens that a layer with a sliding window sees, of the first layout's."""
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(query [S, heads, d], key, value [S, kv heads, d]) -> [S, heads * d]"""


def run(machine: Machine) -> Iterator[Row]:
    dtype = machine.pick(torch.bfloat16, torch.float32)
    layouts, window = machine.pick(LAYOUTS, SMALL), machine.pick(WINDOW, SMALL_WINDOW)
    for layout, most in (*((layout, None) for layout in layouts), (layouts[0], window)):
        inputs = Inputs(machine, layout, dtype, most)
        where = f"{layout}" if most is None else f"window {most}, {layout}"
        for name, make in (("SDPA per block", per_block), ("FlexAttention", flex)):
            yield from attempt(f"{name}, {where}", lambda make=make, i=inputs: measure(machine, i, make))
            machine.release()


class Inputs:
    def __init__(self, machine: Machine, layout: Layout, dtype: torch.dtype, window: int | None):
        """`window`: the tokens that one sees, itself included; None: all."""
        heads, kv_heads, d = machine.pick((HEADS, KV_HEADS, HEAD_DIM), (4, 2, 16))
        self.tree = layout.tree()
        self.device = machine.device
        size = len(self.tree.ids_S)
        self.query, self.key, self.value, self.gradient = (
            torch.randn(size, n, d, device=self.device, dtype=dtype).requires_grad_()
            for n in (heads, kv_heads, kv_heads, heads)
        )
        self.gradient = self.gradient.detach().flatten(1)
        self.window = window
        self.sees = sees(self.tree, self.device, window or size)
        rows = torch.arange(size, device=self.device)
        self.visible_SS = self.sees(None, None, rows[:, None], rows[None, :])

    @property
    def operations(self) -> float:
        """The operations of a forward pass."""
        return 4.0 * int(self.visible_SS.sum()) * self.query.shape[1] * self.query.shape[2]


def sees(tree: TokenTree, device: torch.device, window: int) -> Callable[..., Tensor]:
    """Returns FlexAttention's mask: a token sees itself and what comes before it on its path, `window` tokens in all.
    Segments are in depth-first order, so that those below segment n are the numbers after it up to its last
    descendant."""
    count = len(tree.parents_N)
    last_N = list(range(count))
    for n in range(count - 1, -1, -1):
        if tree.parents_N[n] >= 0:
            last_N[tree.parents_N[n]] = max(last_N[tree.parents_N[n]], last_N[n])
    lengths = torch.tensor(tree.cu_seqlens_N1).diff()
    segment_S = torch.repeat_interleave(torch.arange(count), lengths).to(device)
    last_S = torch.tensor(last_N, device=device)[segment_S]

    position_S = tree.positions_S.to(device)

    def mask(b, h, q, k):
        return (k <= q) & (segment_S[q] <= last_S[k]) & (position_S[q] - position_S[k] < window)

    return mask


def per_block(inputs: Inputs) -> Attention:
    tree = inputs.tree
    window = inputs.window
    params = tree_params(tree.positions_S, tree.cu_seqlens_N1, tree.parents_N, inputs.device, window)
    config = SimpleNamespace(
        window_size=None if window is None else (window - 1, 0),
        window_attn_skip_freq=[1],
    )
    attention = TreeAttention(config, scale=inputs.query.shape[-1] ** -0.5)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q[:, None], k[:, None], v[:, None], packed_seq_params=params)[:, 0]

    return attend


def flex(inputs: Inputs) -> Attention:
    size, on_gpu = len(inputs.tree.ids_S), inputs.device.type == "cuda"
    mask = create_block_mask(inputs.sees, None, None, size, size, device=str(inputs.device))
    call: Any = torch.compile(flex_attention, dynamic=False) if on_gpu else flex_attention

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
        return call(*heads_first, block_mask=mask, enable_gqa=True)[0].transpose(0, 1).flatten(1)

    return attend


def measure(machine: Machine, inputs: Inputs, make: Callable[[Inputs], Attention]) -> Row:
    plan = machine.seconds(lambda: make(inputs), runs=3)
    attend = make(inputs)
    # FlexAttention has no backward pass on a CPU
    learns = machine.is_gpu or make is per_block
    leaves = [inputs.query, inputs.key, inputs.value]
    with torch.set_grad_enabled(learns):
        out = attend(*leaves) if learns else attend(*(leaf.detach() for leaf in leaves))
    gradients = torch.autograd.grad(out, leaves, inputs.gradient) if learns else ()
    error = compare(inputs, out.detach(), gradients)
    with torch.no_grad():
        forward = machine.seconds(lambda: attend(*(leaf.detach() for leaf in leaves)))
    found: Row = {"plan ms": 1e3 * plan, "forward ms": 1e3 * forward}
    found["forward TFLOP/s"] = inputs.operations / forward / 1e12
    if learns:
        both = machine.seconds(lambda: torch.autograd.grad(attend(*leaves), leaves, inputs.gradient))
        found["backward ms"] = 1e3 * (both - forward)
        found["backward TFLOP/s"] = 2.5 * inputs.operations / max(both - forward, 1e-9) / 1e12
    return {**found, "error": error, "ok": error <= ERROR[inputs.query.dtype]}


def compare(inputs: Inputs, out: Tensor, gradients: tuple[Tensor, ...]) -> float:
    """Returns the largest relative error of output and gradients, of only what the first key-value head sees."""
    heads, d = inputs.query.shape[1] // inputs.key.shape[1], inputs.query.shape[2]
    q, k, v = (
        x[:, :n].detach().float().requires_grad_()
        for x, n in ((inputs.query, heads), (inputs.key, 1), (inputs.value, 1))
    )
    found: list[Tensor] = []
    sums = [torch.zeros_like(x) for x in (q, k, v)]
    for head in range(heads):
        scores_SS = (q[:, head] @ k[:, 0].T) / d**0.5
        attended = scores_SS.masked_fill(~inputs.visible_SS, float("-inf")).softmax(-1) @ v[:, 0]
        found.append(attended.detach())
        own = inputs.gradient[:, head * d : (head + 1) * d].float()
        for total, part in zip(sums, torch.autograd.grad(attended, (q, k, v), own), strict=True):
            total += part
    pairs = [(out[:, : heads * d], torch.cat(found, 1))]
    pairs += [(x[:, : total.shape[1]], total) for x, total in zip(gradients, sums, strict=bool(gradients))]
    return max(float((x.float() - y).abs().mean() / y.abs().mean()) for x, y in pairs)
