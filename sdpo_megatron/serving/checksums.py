"""What servers must say that they hold after a push: a hash of each parameter, from the tensors that are sent.

SGLang joins some Hugging Face tensors into one parameter, those of a layer's experts too, and cuts it over its
tensor-parallel ranks; its `/weights_checker` answers with a 64-bit hash of each rank's part. The same parts are put
together here and hashed alike (SGLang 0.5.23: `utils/weight_checker.py`, `managers/mm_utils.py::tensor_hash`).
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from sdpo_megatron.models.families.base import Parameter, Rule
from sdpo_megatron.models.shape import ModelShape

SERVER_NAMES = {Rule.QKV: ("q_proj", "qkv_proj"), Rule.GATED: ("gate_proj", "gate_up_proj")}
"""Rule -> (what the first joined tensor is called, what the server calls the whole)."""
SERVER_EXPERTS = {Rule.GATED: "w13_weight", Rule.ROWS: "w2_weight"}
"""Rule -> what the server calls all experts' weights of that rule in a layer."""
VOCABULARY_MULTIPLE = 64
"""SGLang fills embedding and head up to a multiple of so many rows, times the ranks where they would not divide it."""

WORDS_PER_TILE = 8192
_LOW_32 = 0xFFFFFFFF
_SEEDS = (0x243F6A88, ((0x243F6A88 * 0x9E3779B1) ^ 0xDEADBEEF) & _LOW_32)
_PLACES = ((0x27D4EB2D, 15), (0x165667B1, 13))
"""(factor, rotation) by which a word's place enters each half of the hash."""


class SentChecksums:
    """Hashes of one push's tensors, of one pipeline stage, by the server's tensor-parallel rank and parameter."""

    def __init__(self, shape: ModelShape, server_tp: int, hashed: Callable[[Tensor], str] | None = None):
        """`hashed` is the servers' hash; by default that of where the tensors are."""
        self._hashed = hashed or tensor_hash
        self.by_rank: list[dict[str, str]] = [{} for _ in range(server_tp)]
        self._shape = shape
        self._parts: dict[str, Tensor] = {}
        """Tensors whose parameter is not complete yet."""
        self._served = served_parameters(shape)
        self._served_of = {
            name: served
            for served, parameters in self._served.items()
            for parameter in parameters
            for name in parameter.parts
        }

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes one tensor as it is sent, under its Hugging Face name; those of one server's parameter come one after
        another."""
        self._parts[name] = tensor
        served = self._served_of[name]
        parameters = self._served[served]
        if len(self._parts) < sum(len(parameter.parts) for parameter in parameters):
            return
        parts = [[self._parts.pop(part) for part in parameter.parts] for parameter in parameters]
        for rank, checksums in enumerate(self.by_rank):
            own = [
                server_part(parameter.rule, some, self._shape, len(self.by_rank), rank)
                for parameter, some in zip(parameters, parts, strict=True)
            ]
            checksums[served] = self._hashed(own[0] if parameters[0].expert is None else torch.stack(own))


def served_parameters(shape: ModelShape) -> dict[str, list[Parameter]]:
    """Returns what the server calls its parameter -> those that it is made of, one for each expert."""
    found: dict[str, list[Parameter]] = {}
    for parameter in shape.parameters():
        found.setdefault(server_name(parameter), []).append(parameter)
    return found


def server_name(parameter: Parameter) -> str:
    """Returns what the server calls the whole that `parameter` is, or is a part of: it has all experts in one."""
    name = next(iter(parameter.parts))
    if parameter.expert is not None:
        at, of_experts, _ = name.partition("experts.")
        return f"{at}{of_experts}{SERVER_EXPERTS[parameter.rule]}"
    own, joined = SERVER_NAMES.get(parameter.rule, ("", ""))
    return name.replace(own, joined) if own else name


def server_part(rule: Rule, parts: Sequence[Tensor], shape: ModelShape, tp: int, rank: int) -> Tensor:
    """Returns what the server's rank holds of a parameter that is made of `parts`."""
    if rule is Rule.QKV:
        query, key, value = parts
        # where there are more ranks than key-value heads, several hold the same
        copies = max(1, tp // shape.kv_heads)
        pieces = [x.chunk(tp // copies)[rank // copies] for x in (key, value)]
        return torch.cat([query.chunk(tp)[rank], *pieces])
    if rule is Rule.GATED:
        return torch.cat([part.chunk(tp)[rank] for part in parts])
    (whole,) = parts
    if rule is Rule.ROWS:
        return whole.chunk(tp, dim=1)[rank]
    if rule is Rule.VOCABULARY and not shape.family.served_whole:
        rows = padded_rows(len(whole), tp)
        padding = whole.new_zeros(rows - len(whole), whole.shape[1])
        return torch.cat([whole, padding]).chunk(tp)[rank]
    return whole


def padded_rows(vocab: int, tp: int) -> int:
    multiple = VOCABULARY_MULTIPLE
    if -(-vocab // multiple) * multiple % tp:
        multiple *= tp
    return -(-vocab // multiple) * multiple


def differing(sent: Sequence[Mapping[str, str]], held: Sequence[tuple[int, Mapping[str, str]]]) -> list[str]:
    """Returns the parameters whose hash is another than that of what was sent. `sent` is by tensor-parallel rank,
    `held` (rank, hashes) of each of the server's processes.

    Raises a KeyError with the name of a parameter that was sent and of which the server says nothing."""
    wrong: dict[str, None] = {}
    for rank, checksums in enumerate(sent):
        answers = [held_checksums for held_rank, held_checksums in held if held_rank == rank]
        for name, checksum in checksums.items():
            found = [answer[name] for answer in answers if name in answer]
            if not found:
                raise KeyError(name)
            if any(other != checksum for other in found):
                wrong[name] = None
    return list(wrong)


def tensor_hash(x: Tensor) -> str:
    """Returns SGLang's hash of a tensor's bytes, 16 hexadecimal digits: the beginning of SHA-256 on a CPU, a hash of
    its own on a GPU."""
    if x.is_cuda:
        return gpu_tensor_hash(x)
    flat = _bytes(x)
    return hashlib.sha256(flat.numpy().data).hexdigest()[:16]


def gpu_tensor_hash(x: Tensor) -> str:
    """Returns what SGLang on a GPU says of a tensor, wherever that is."""
    return f"{gpu_hash(_bytes(x)):016x}"


def _bytes(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(-1).view(torch.uint8)


def gpu_hash(flat: Tensor) -> int:
    """Returns what SGLang's GPU kernel says of a uint8 tensor: two 32-bit sums of mixed words (MurmurHash3's finaliser,
    the word's place mixed in) for each tile, the tiles' 64 bits added up, SplitMix64's finaliser."""
    words = torch.nn.functional.pad(flat, (0, -flat.numel() % 4)).view(torch.int32)
    if not words.numel():
        return 0
    total, tiles_at_once = 0, 256
    for first in range(0, words.numel(), WORDS_PER_TILE * tiles_at_once):
        some = words[first : first + WORDS_PER_TILE * tiles_at_once].to(torch.int64) & _LOW_32
        place = torch.arange(first, first + some.numel(), device=flat.device) & _LOW_32
        halves = [_tiles(some, place, k, words.numel()) for k in range(2)]
        tiles = (halves[0] << 32) | halves[1]
        total = (total + int(tiles.sum())) & 0xFFFFFFFFFFFFFFFF
    total = ((total ^ (total >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    total = ((total ^ (total >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return total ^ (total >> 31)


def _tiles(words: Tensor, place: Tensor, half: int, count: int) -> Tensor:
    """One half of the hash of each tile. int64 holds the 32-bit words: products lose only bits above them."""
    factor, rotation = _PLACES[half]
    rotated = ((place << rotation) | (place >> (32 - rotation))) & _LOW_32
    mixed = _mix(words ^ ((place * factor + _SEEDS[half]) & _LOW_32) ^ rotated)
    tiles = torch.nn.functional.pad(mixed, (0, -len(mixed) % WORDS_PER_TILE)).view(-1, WORDS_PER_TILE).sum(1)
    return _mix((tiles & _LOW_32) ^ ((count * 4) & _LOW_32))


def _mix(x: Tensor) -> Tensor:
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _LOW_32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _LOW_32
    return x ^ (x >> 16)
