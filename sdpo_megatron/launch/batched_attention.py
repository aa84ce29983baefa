"""Attention of a whole batch at once, as a backend of SGLang for a machine without a GPU. It runs in the server's
environment, not the trainer's, and imports nothing of sdpo_megatron.

SGLang's `torch_native`, which defines what is computed here, loops over the sequences of a batch in every layer and
asks anew for all of a sequence when it grows by one token. Here a forward is planned once, before its layers: the
new tokens of sequences of about one length form a piece, whose keys and values are gathered from the cache and
attended in one call. A long prompt is several pieces, so that memory stays bounded.

Shape letters here: N sequences of a batch, T new tokens of all of them, B sequences of a piece, Q new tokens of each
and L positions that they see (both padded to the piece's longest), H query heads, K key-value heads, D a head's size.
"""

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from sglang.srt.arg_groups import choices  # pyright: ignore[reportMissingImports]
from sglang.srt.layers.attention import attention_registry  # pyright: ignore[reportMissingImports]
from sglang.srt.layers.attention.base_attn_backend import (  # pyright: ignore[reportMissingImports]
    AttentionBackend,
)
from sglang.srt.layers.radix_attention import (  # pyright: ignore[reportMissingImports]
    AttentionType,
    RadixAttention,
)
from sglang.srt.mem_cache.memory_pool import KVWriteLoc  # pyright: ignore[reportMissingImports]
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool  # pyright: ignore[reportMissingImports]
from torch.nn.functional import scaled_dot_product_attention

NAME = "batched_sdpa"
"""What `--attention-backend` calls it."""

PIECE_POSITIONS = 2048
"""Most positions whose keys and values a piece gathers, unless one sequence has more."""

PIECE_SCORES = 2**22
"""Most scores of one head in a piece, unless one token has more: so large is its mask."""

INTERFACES = (
    (attention_registry.register_attention_backend, ("name",)),
    (KVWriteLoc, ("loc", "swa_loc")),
    (AttentionBackend.init_forward_metadata, ("forward_batch",)),
    (AttentionBackend.forward_extend, ("q", "k", "v", "layer", "forward_batch", "save_kv_cache")),
    (AttentionBackend.forward_decode, ("q", "k", "v", "layer", "forward_batch", "save_kv_cache")),
)
"""What this module calls or overrides in SGLang, with the parameters that it knows."""


@dataclass(frozen=True)
class Span:
    """Some successive new tokens of one sequence."""

    sequence: int
    first_row: int
    """Of the batch's T new tokens."""
    first_position: int
    """In the sequence."""
    length: int

    @property
    def seen(self) -> int:
        """Positions that its last token sees."""
        return self.first_position + self.length


@dataclass(frozen=True)
class Piece:
    """What is attended in one call."""

    rows_BQ: torch.Tensor
    """Which of the T new tokens; a span shorter than the piece's longest repeats its last one."""
    slots_BL: torch.Tensor
    """Where their keys and values lie in the cache; a shorter sequence repeats its first position."""
    last_BQ: torch.Tensor
    """The last position that a token sees: its own. The mask that follows from it may be large, so each layer makes it
    anew."""

    def mask_BQL(self, window: int) -> torch.Tensor:
        """Whether a token sees a position: its own, and those up to `window` before it; -1: all before it."""
        position_L, last_BQ1 = torch.arange(self.slots_BL.shape[1]), self.last_BQ[:, :, None]
        seen_BQL = position_L <= last_BQ1
        return seen_BQL if window < 0 else seen_BQL & (position_L >= last_BQ1 - window)


def spans(prefixes_N: Sequence[int], lengths_N: Sequence[int]) -> list[Span]:
    """Cuts a batch, sequences of `lengths_N` new tokens behind `prefixes_N` cached ones, so that no span asks for more
    than PIECE_SCORES."""
    result, row = [], 0
    for sequence, (prefix, length) in enumerate(zip(prefixes_N, lengths_N, strict=True)):
        most = max(1, PIECE_SCORES // (prefix + length))
        result += [
            Span(sequence, row + start, prefix + start, min(most, length - start))
            for start in range(0, length, most)
        ]
        row += length
    return result


def packed(parts: Iterable[Span]) -> list[list[Span]]:
    """Returns the spans in pieces of similar sizes, within PIECE_POSITIONS and PIECE_SCORES."""
    pieces: list[list[Span]] = []
    room = 0
    longest_seen = 0
    for span in sorted(parts, key=lambda span: (span.length, span.seen), reverse=True):
        longest_seen = max(longest_seen, span.seen)
        if room > 0 and (len(pieces[-1]) + 1) * longest_seen <= room:
            pieces[-1].append(span)
        else:
            pieces.append([span])
            # the first span of a piece has the most new tokens
            room = min(PIECE_POSITIONS, PIECE_SCORES // span.length)
            longest_seen = span.seen
    return pieces


def _piece(part: list[Span], requests_N: torch.Tensor, slots_RC: torch.Tensor) -> Piece:
    """`slots_RC` are the places in the cache of R requests' C positions; `requests_N` says which requests the batch's
    sequences are."""
    sequence_B1, row_B1, position_B1, length_B1, seen_B1 = torch.tensor(
        [[s.sequence, s.first_row, s.first_position, s.length, s.seen] for s in part]
    ).split(1, dim=1)
    offset_BQ = torch.minimum(torch.arange(int(length_B1.max())), length_B1 - 1)
    position_L = torch.arange(int(seen_B1.max()))
    # what was not written is not read either: 0 times NaN is NaN
    written_BL = torch.where(position_L < seen_B1, position_L, 0)
    slots_BL = slots_RC[requests_N[sequence_B1], written_BL].long()
    return Piece(row_B1 + offset_BQ, slots_BL, position_B1 + offset_BQ)


class Gatherer:
    """Copies keys or values out of the cache into memory that it keeps: fresh memory would cost more time, in page
    faults, than the attention."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def __call__(self, cache_SKD: torch.Tensor, slots_BL: torch.Tensor) -> torch.Tensor:
        """Returns [B, K, L, D], valid until the next call."""
        count, width = slots_BL.numel(), cache_SKD[0].numel()
        if self._memory.numel() < count * width or self._memory.dtype != cache_SKD.dtype:
            self._memory = cache_SKD.new_empty(count * width)
        found = self._memory[: count * width].view(count, width)
        torch.index_select(cache_SKD.flatten(1), 0, slots_BL.flatten(), out=found)
        return found.view(*slots_BL.shape, *cache_SKD.shape[1:]).transpose(1, 2)


def _attended(
    q_BQHD: torch.Tensor, k_BKLD: torch.Tensor, v_BKLD: torch.Tensor, mask_BQL: torch.Tensor, scale: float
) -> torch.Tensor:
    (B, Q, H, D), K = q_BQHD.shape, k_BKLD.shape[1]
    mask_B1QL = mask_BQL[:, None]
    if Q == 1:
        # the query heads of a key-value head as so many rows: keys and values are not copied for each
        q_BKRD = q_BQHD.view(B, K, H // K, D)
        found = scaled_dot_product_attention(q_BKRD, k_BKLD, v_BKLD, attn_mask=mask_B1QL, scale=scale)
        return found.reshape(B, 1, H, -1)
    q_BHQD = q_BQHD.transpose(1, 2)
    found = scaled_dot_product_attention(
        q_BHQD, k_BKLD, v_BKLD, attn_mask=mask_B1QL, scale=scale, enable_gqa=H != K
    )
    return found.transpose(1, 2)


class BatchedAttention(AttentionBackend):
    """SGLang's backend of that name."""

    def __init__(self, model_runner):
        """Raises NotImplementedError for a model or a setting that asks for more than causal attention over earlier
        tokens."""
        super().__init__()
        refuse_other_attention(model_runner)
        self._slots = model_runner.req_to_token_pool
        # models ask for it by this name
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self._keys, self._values = Gatherer(), Gatherer()
        self._pieces: list[Piece] = []

    def init_forward_metadata(self, forward_batch) -> None:
        """Plans a forward, once for all layers."""
        seen_N = forward_batch.seq_lens.tolist()
        if forward_batch.forward_mode.is_decode():
            lengths_N = [1] * len(seen_N)
        elif forward_batch.forward_mode.is_idle():
            lengths_N, seen_N = [], []
        else:
            lengths_N = forward_batch.extend_seq_lens.tolist()
        prefixes_N = [seen - length for seen, length in zip(seen_N, lengths_N, strict=True)]
        requests_N, slots_RC = forward_batch.req_pool_indices, self._slots.req_to_token
        self._pieces = [_piece(part, requests_N, slots_RC) for part in packed(spans(prefixes_N, lengths_N))]

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True):
        """Returns the attention [T, H * D] of one layer, and keeps the new keys and values in the cache, which has S
        places. K divides H; a value's D may differ from a key's."""
        if save_kv_cache and k is not None:
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        q_THD = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        k_SKD = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        v_SKD = self.token_to_kv_pool.get_value_buffer(layer.layer_id)
        out_THD = q_THD.new_empty(*q_THD.shape[:2], v_SKD.shape[-1])
        for piece in self._pieces:
            k_BKLD = self._keys(k_SKD, piece.slots_BL).to(q_THD.dtype)
            v_BKLD = self._values(v_SKD, piece.slots_BL).to(q_THD.dtype)
            mask_BQL = piece.mask_BQL(layer.sliding_window_size)
            out_THD[piece.rows_BQ] = _attended(q_THD[piece.rows_BQ], k_BKLD, v_BKLD, mask_BQL, layer.scaling)
        return out_THD.flatten(1)

    forward_decode = forward_extend

    def support_triton(self) -> bool:
        """Returns False: there is no GPU."""
        return False


def refuse_other_attention(model_runner) -> None:
    """Raises NotImplementedError where BatchedAttention would compute something else than the model, or SGLang choose
    a kernel of a GPU by the backend's name."""
    wrong = None
    if model_runner.use_mla_backend:
        wrong = "multi-head latent attention (MLA)"
    elif model_runner.page_size != 1:
        wrong = f"--page-size {model_runner.page_size}"
    elif model_runner.spec_algorithm.is_some():
        wrong = "speculative decoding"
    elif isinstance(model_runner.token_to_kv_pool, SWAKVPool):
        wrong = "a cache that forgets what is behind a sliding window"
    for name, layer in model_runner.model.named_modules():
        if isinstance(layer, RadixAttention) and (what := _unlike(layer)):
            wrong = f"{name} with {what}"
            break
    if wrong:
        raise NotImplementedError(
            f"--attention-backend {NAME} does not compute {wrong}: leave that out, or take a slower one by "
            "server.args=[--attention-backend,torch_native] if that computes it"
        )


def _unlike(layer: RadixAttention) -> str | None:
    if layer.is_cross_attention:
        return "cross attention"
    if layer.attn_type != AttentionType.DECODER:
        return f"attention of type {layer.attn_type.value}"
    if layer.logit_cap:
        return f"scores capped at {layer.logit_cap}"
    return None


def register() -> None:
    """Makes SGLang know the backend in this process. Raises SystemExit, in one line, for an SGLang of other
    interfaces."""
    for interface, known in INTERFACES:
        found = inspect.signature(interface).parameters
        if missing := [name for name in known if name not in found]:
            raise SystemExit(
                f"error: sglang's {interface.__qualname__} has no parameter {', '.join(missing)}, which "
                "batched_attention.py relies on: install the version that sglang_on_cpu.py names"
            )
    choices.add_attention_backend_choices([NAME])
    attention_registry.register_attention_backend(NAME)(BatchedAttention)
