"""Whether what the launcher starts fits into this machine's memory, and how large the server's key-value cache may be.

All of it follows from config.json, the settings and what is free. What it counts is what is there for certain; what a
step needs beside that (activations, logits) is not known before it, and half of what is left is kept for it."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

import psutil

from sdpo_megatron.algorithm.losses import build_terms
from sdpo_megatron.config import Config, ParallelSettings, ServerSettings, TeacherSettings
from sdpo_megatron.errors import ConfigError
from sdpo_megatron.models.shape import ModelShape
from sdpo_megatron.models.weight_files import described
from sdpo_megatron.preflight.cgroups import groups, memory_left

ITEM = {"float32": 4, "bfloat16": 2}
"""Bytes of a number of each `model.dtype`."""
PROCESS_BYTES = 1 << 29
"""What a process of server or trainer has beside weights: Python, torch, libraries."""
SERVER_PROCESSES = 3
"""Those of a server with one tensor-parallel rank; each further rank is one more."""
USABLE_OF_A_GPU = 0.9
"""The rest goes to CUDA contexts, communication and what lies between blocks."""
COUNTED_FRACTION = 0.95
"""What SGLang is told where the cache's size is computed here. It counts as its own whatever was taken since it
started, the ranks' weights too: a fraction that fits the server alone would refuse to start beside them."""


CACHE_SHARE = 0.5
"""Of what is left, for the key-value cache; a step has the rest."""
CACHE_SHARE_IN_TURN = 0.9
"""The same with `server.release_memory`: a step comes when the server has given all of its memory back, and the rest is
for the passes of canary and evaluation, which keep no activations. What the trainer has for good (weights, gradients,
optimizer, teacher) it has beside the server either way."""


@dataclass(frozen=True, kw_only=True)
class ServerMemory:
    """What a server is told of memory."""

    fraction: float
    """Of what is free when it starts: for weights and key-value cache together."""
    cache_tokens: int | None
    """Tokens of the key-value cache; None: as many as the fraction leaves room for."""


def plan_server_memory(
    config: Config,
    shape: ModelShape,
    teacher: ModelShape | None,
    *,
    device: Literal["cpu", "cuda"],
    bytes_free: int,
    responses: int,
    tokens_each: int,
    trains: bool = True,
) -> ServerMemory:
    """Returns the memory of the server that the launcher starts. `server.memory_fraction`, if given, is taken as it is.

    `bytes_free` is the machine's on a CPU, and else one GPU's. `responses`, of up to `tokens_each` tokens, are sampled
    at once: the cache holds all of them, if its share of what the rest leaves is enough, and one at least. Unless it
    `trains`, there is no trainer beside the server. Raises ConfigError, with the figures, where that does not fit.
    """
    if config.server.memory_fraction is not None:
        return ServerMemory(fraction=config.server.memory_fraction, cache_tokens=None)
    item = ITEM[config.model.dtype]
    token = cached_bytes_per_token(shape, config.server, item)
    needs = {
        "the server's weights": served_bytes(shape, config.server, item),
        f"its key-value cache for one response of {tokens_each} tokens": token * tokens_each,
    }
    if trains:
        needs["the trainer's weights, gradients and optimizer"] = trained_bytes(shape, config, item)
    if teacher is not None and (taught := teacher_bytes(teacher, config.teacher, config.parallel, item)):
        needs["the teacher's weights"] = taught
    if device == "cuda":
        needs, bytes_free = _on_one_gpu(needs, config), int(USABLE_OF_A_GPU * bytes_free)
        token //= config.server.tp
    else:
        processes = SERVER_PROCESSES + config.server.tp - 1 + (config.parallel.ranks if trains else 1)
        needs[f"{processes} processes"] = processes * PROCESS_BYTES
    left = bytes_free - sum(needs.values())
    if left < 0:
        raise ConfigError(_too_little(needs, bytes_free, device))
    share = CACHE_SHARE_IN_TURN if config.server.release_memory else CACHE_SHARE
    return ServerMemory(
        fraction=COUNTED_FRACTION,
        cache_tokens=max(tokens_each, min(responses * tokens_each, int(share * left) // token)),
    )


def parameter_count(shape: ModelShape) -> int:
    return sum(prod(size) for _, size in described(shape))


def served_bytes(shape: ModelShape, server: ServerSettings, item: int) -> int:
    """Returns the bytes of a server's weights, on all tensor-parallel ranks together."""
    copies = server.tp - 1 if shape.family.served_whole else 0
    return (parameter_count(shape) + copies * shape.vocab * shape.hidden) * item


def cached_bytes_per_token(shape: ModelShape, server: ServerSettings, item: int) -> int:
    """Returns the bytes that a key-value cache keeps of one token, on all tensor-parallel ranks together: each has one
    key-value head at least."""
    heads = max(shape.kv_heads, server.tp)
    return shape.cached_per_token * heads // shape.kv_heads * item


def trained_bytes(shape: ModelShape, config: Config, item: int) -> int:
    """Returns the bytes that all ranks together keep of the policy: per number its weight and a float32 gradient on
    each data-parallel rank; two moments, a float32 weight where it is not float32 itself, and the average of an `ema`
    teacher once."""
    count = parameter_count(shape)
    if shape.tie_embeddings and config.parallel.pp > 1:
        # the last stage has a copy of the embedding for its head
        count += shape.vocab * shape.hidden
    has_teacher = build_terms(config.loss)[0].loss.teacher_views > 0
    average = 4 if has_teacher and config.teacher.name == "ema" else 0
    return count * (config.parallel.dp * (item + 4) + 8 + (0 if item == 4 else 4) + average)


def teacher_bytes(shape: ModelShape, teacher: TeacherSettings, parallel: ParallelSettings, item: int) -> int:
    """Returns the bytes of the weights that only teach, on all ranks together."""
    return 0 if teacher.name == "live" else parallel.dp * parameter_count(shape) * item


def _on_one_gpu(needs: Mapping[str, int], config: Config) -> dict[str, int]:
    """A GPU that holds a rank of the server and one of the trainer: the launcher gives both the first GPUs."""
    server_ranks, ranks = config.server.tp, config.parallel.ranks
    own = ("the server's", "its")
    return {what: size // (server_ranks if what.startswith(own) else ranks) for what, size in needs.items()}


def _too_little(needs: Mapping[str, int], free: int, device: str) -> str:
    figures = ", ".join(f"{what} {size / 2**30:.2f}" for what, size in needs.items())
    where = "this machine has" if device == "cpu" else "each GPU can give"
    return (
        f"model.path does not fit: server and trainer need at least {sum(needs.values()) / 2**30:.2f} GiB ({figures}), "
        f"but {where} {free / 2**30:.2f} GiB; take a smaller model or more memory, give server.urls of servers "
        "elsewhere, or have it tried by setting server.memory_fraction."
    )


def bytes_free(device: Literal["cpu", "cuda"], server: ServerSettings) -> int:
    """Returns what `plan_server_memory` asks: the machine's free memory within the limits of its containers, or all
    that the smallest of the server's GPUs has."""
    if device == "cpu":
        limits = [left for group in groups("memory") if (left := memory_left(group)) is not None]
        return min([psutil.virtual_memory().available, *limits])
    import torch

    gpus = range(min(server.tp, torch.cuda.device_count()))
    return min(torch.cuda.get_device_properties(gpu).total_memory for gpu in gpus)
