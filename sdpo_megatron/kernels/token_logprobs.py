"""Log-probabilities of given tokens under vocabulary-sharded logits, from the final hidden states.

Plain torch on any device. Rows of logits exist `chunk_tokens` at a time: where there are several chunks, each is
computed again in the backward pass instead of being kept.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True, kw_only=True)
class VocabShard:
    """Which columns of the logits this rank holds."""

    start: int
    """Token id of the first column."""
    vocab_size: int
    """Tokens of the whole vocabulary; columns beyond it are padding and never part of the softmax."""
    group: dist.ProcessGroup | None
    """The ranks that share the vocabulary; None: this rank holds all of it."""


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose result every rank uses in the same way, so that its gradient passes straight through."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:  # type: ignore[override]
        if group is None or group.size() == 1:
            return x
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return grad, None


def token_logprobs(
    logits_UV: Tensor, row_T: Tensor, target_T: Tensor, *, shard: VocabShard, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target in its row, and each row's entropy.

    Args:
        logits_UV: this rank's shard of the logits, any floating type; computed with in float32 at least.
        row_T: row of `logits_UV` that predicts each token.
        target_T: token ids of the whole vocabulary.
        temperature: logits are divided by it, as the sampler does.

    Returns:
        logprobs_T (nats, differentiable, equal on all ranks of the group) and entropy_U (nats, detached).
    """
    logits_UV = logits_UV.to(torch.promote_types(logits_UV.dtype, torch.float32)) / temperature
    columns = logits_UV.shape[1]
    padded = shard.start + columns - shard.vocab_size
    if padded > 0:
        is_padding_V = torch.arange(columns, device=logits_UV.device) >= columns - padded
        logits_UV = logits_UV.masked_fill(is_padding_V, float("-inf"))
    max_U = logits_UV.detach().max(dim=-1).values
    if shard.group is not None and shard.group.size() > 1:
        dist.all_reduce(max_U, op=dist.ReduceOp.MAX, group=shard.group)
    exp_UV = (logits_UV - max_U[:, None]).exp()
    sum_U = _SumOverRanks.apply(exp_UV.sum(dim=-1), shard.group)
    log_sum_U = sum_U.log() + max_U

    local_T = target_T - shard.start
    here_T = (local_T >= 0) & (local_T < columns)
    own_T = logits_UV[row_T, local_T.clamp(0, columns - 1)].where(here_T, logits_UV.new_zeros(()))
    target_logit_T = _SumOverRanks.apply(own_T, shard.group)
    return target_logit_T - log_sum_U[row_T], _entropy(logits_UV, exp_UV, sum_U, log_sum_U, shard)


@torch.no_grad()
def _entropy(
    logits_UV: Tensor, exp_UV: Tensor, sum_U: Tensor, log_sum_U: Tensor, shard: VocabShard
) -> Tensor:
    # log(sum) - E[logit]; a padding column has probability 0 and must not meet its -inf
    expected_U = (exp_UV * logits_UV.masked_fill(exp_UV == 0, 0.0)).sum(dim=-1)
    return log_sum_U - _SumOverRanks.apply(expected_U, shard.group) / sum_U


def linear_token_logprobs(
    hidden_UD: Tensor,
    head_VD: Tensor,
    row_T: Tensor,
    target_T: Tensor,
    *,
    shard: VocabShard,
    temperature: float,
    chunk_tokens: int,
) -> tuple[Tensor, Tensor]:
    """`token_logprobs` of `hidden_UD @ head_VD.T`, at most `chunk_tokens` rows of logits at a time."""

    def part(hidden: Tensor, head: Tensor, row: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits_UV = F.linear(hidden.to(head.dtype), head)
        return token_logprobs(logits_UV, row, target, shard=shard, temperature=temperature)

    rows = hidden_UD.shape[0]
    if rows <= chunk_tokens:
        return part(hidden_UD, head_VD, row_T, target_T)
    logprobs, entropies, where = [], [], []
    for start in range(0, rows, chunk_tokens):
        inside = ((row_T >= start) & (row_T < start + chunk_tokens)).nonzero().squeeze(1)
        hidden = hidden_UD[start : start + chunk_tokens]
        logprob, entropy = checkpoint(
            part, hidden, head_VD, row_T[inside] - start, target_T[inside], use_reentrant=False
        )
        logprobs.append(logprob)
        entropies.append(entropy)
        where.append(inside)
    return torch.cat(logprobs)[torch.cat(where).argsort()], torch.cat(entropies)
