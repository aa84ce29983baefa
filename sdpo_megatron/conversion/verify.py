"""Whether two directories hold the same model: bit by bit, and by what they compute."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from sdpo_megatron.algorithm.batching import View, microbatch
from sdpo_megatron.conversion.dtypes import Rounding
from sdpo_megatron.conversion.stored_weights import StoredWeights
from sdpo_megatron.errors import RunFailed
from sdpo_megatron.models.hf_tensors import HfTensors
from sdpo_megatron.preflight.boundary import reading
from sdpo_megatron.trainer.dist_weights import load_weights
from sdpo_megatron.trainer.forward import run_microbatches
from sdpo_megatron.trainer.model import build_model
from sdpo_megatron.trainer.parallel import ParallelState

TOKENS = 16
MOST_APART = 1e-3
"""Nats that two implementations in float32 may be apart; a tensor in another's place is thousands of times more."""


def check_bits(
    hf: HfTensors,
    megatron: StoredWeights,
    dtype: torch.dtype | None,
    on_bytes: Callable[[int], None],
) -> int:
    """Returns how many tensors are the same in both, in the type `dtype` where one was asked for. Raises RunFailed
    where one differs."""
    rounding = Rounding(dtype)
    names: set[str] = set()
    for place in megatron.places:
        for name, begin, stored in megatron.blocks_of(place):
            own = rounding.apply(hf.read(name, begin, len(stored)), name)
            if not _same_bits(own, rounding.apply(stored, name)):
                raise RunFailed(
                    f"{name} is not the same in {hf.directory} and {megatron.directory}: this is a bug."
                )
            names.add(name)
            on_bytes(stored.nbytes)
    return len(names)


def _same_bits(first: Tensor, second: Tensor) -> bool:
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return torch.equal(*(one.contiguous().view(-1).view(torch.uint8) for one in (first, second)))


@torch.no_grad()
def check_logits(
    hf: Path, megatron: StoredWeights, dtype: torch.dtype | None, parallel: ParallelState
) -> float:
    """Returns how far apart, in nats at most, the log-probabilities are that transformers computes with the weights in
    `hf` and this trainer with the others, after each of a few tokens, in float32. Holds the whole model in memory,
    twice. Raises RunFailed where they are more than MOST_APART apart."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(megatron.shape.vocab, (TOKENS,), generator=generator).tolist()
    ours = _by_trainer(megatron, ids, dtype, parallel)
    with reading(f"{hf} by transformers"):
        theirs = _by_transformers(hf, ids, dtype)
    if not (ours.isfinite().all() or theirs.isfinite().all()):
        raise RunFailed("The model's log-probabilities are not finite: its weights are not, or too large.")
    apart = float((ours - theirs).abs().max())
    # a NaN is not less
    if not apart <= MOST_APART:
        raise RunFailed(
            f"transformers with {hf} and the trainer with {megatron.directory} are {apart:g} nats apart: this is a bug."
        )
    return apart


def _by_transformers(directory: Path, ids: list[int], dtype: torch.dtype | None) -> Tensor:
    # takes seconds to import
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=False)
    _round(network, dtype)
    return network(torch.tensor([ids])).logits[0].float().log_softmax(-1)


def _by_trainer(
    megatron: StoredWeights, ids: list[int], dtype: torch.dtype | None, parallel: ParallelState
) -> Tensor:
    chunks: list[nn.Module] = build_model(megatron.shape, torch.float32, parallel, transformer_engine=False)
    load_weights(megatron.directory, chunks, parallel, prefix=megatron.prefix)
    _round(chunks[0], dtype)
    # position t predicts token t + 1; the last one any
    batch = microbatch([View(0, ids[:1], [*ids[1:], 0])])

    def at_loss(batch: object, hidden_UD: Tensor, head_VD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return hidden_UD.new_zeros(()), {"logits": hidden_UD @ head_VD.T}

    (result,) = run_microbatches(chunks, [batch], at_loss, parallel, learn=False)
    return result["logits"][:, : megatron.shape.vocab].log_softmax(-1)


def _round(network: nn.Module, dtype: torch.dtype | None) -> None:
    """Gives the weights the numbers that they have in `dtype`: which of the two directories has others, the direction
    decides."""
    if dtype is not None:
        for weight in network.parameters():
            weight.copy_(weight.to(dtype))
