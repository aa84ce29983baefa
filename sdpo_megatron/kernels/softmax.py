"""Log-probabilities of tokens over vocabulary-sharded logits, and the gradient of what a loss makes of them:
definition and plain torch.

One sweep over a model's logits gives, per row, the running maximum, the sum of exponentials, the target's logit and
the entropy; one all-gather of these few numbers joins the shards. What follows is of size [U] and plain torch, so that
every coefficient (clip, importance weight, blend) shares the kernels. The gradient overwrites the student's logits:

    d loss / d logit_v = (hot 1[v = target] - dense softmax_v) / temperature,    hot = dense = d loss / d logprob

Nothing of the logits' size is allocated on a GPU. All log-probabilities are of the tempered policy. Differences from
the row's maximum are taken before anything is scaled: the other order loses all digits of logits around 1e4.
"""

import torch
from torch import Tensor

from sdpo_megatron.kernels import softmax_triton
from sdpo_megatron.kernels.rows import RowSoftmax, ShardSums
from sdpo_megatron.kernels.vocab import NEGATIVE, VocabShard


def logprob_definition(logits_UV: Tensor, target_U: Tensor, *, temperature: float) -> Tensor:
    """Returns the log-probability of each row's target, [U], from whole rows; it is differentiable."""
    return (logits_UV / temperature).log_softmax(-1).gather(1, target_U[:, None])[:, 0]


def sweep(logits_UV: Tensor, target_U: Tensor, shard: VocabShard) -> Tensor:
    """Returns the sums of this rank's shard, stacked in the order of `ShardSums`, [4, U]."""
    run = softmax_triton.sweep_triton if logits_UV.is_cuda else sweep_plain
    return run(logits_UV, target_U, shard)


def join(sums: ShardSums, scale: float) -> RowSoftmax:
    """Returns the softmax over the columns of all shards; `scale` is 1 / temperature."""
    max_U = sums.max_RU.amax(0)
    shift_RU = (sums.max_RU - max_U) * scale
    scaled_RU = shift_RU.exp()
    exp_sum_U = (scaled_RU * sums.exp_sum_RU).sum(0)
    log_sum_U = exp_sum_U.log()
    expected_U = (scaled_RU * (sums.entropy_sum_RU + shift_RU * sums.exp_sum_RU)).sum(0) / exp_sum_U
    logprob_U = (sums.target_RU.sum(0) - max_U) * scale - log_sum_U
    return RowSoftmax(max_U, log_sum_U, logprob_U, log_sum_U - expected_U)


def write_gradient_(
    logits_UV: Tensor,
    softmax: RowSoftmax,
    target_U: Tensor,
    dense_U: Tensor,
    hot_U: Tensor,
    shard: VocabShard,
) -> None:
    """Overwrites the logits by (hot 1[v = target] - dense softmax_v) / temperature, and padding columns by 0.

    Rows where both coefficients are 0 are not read."""
    run = softmax_triton.write_gradient_triton if logits_UV.is_cuda else write_gradient_plain
    run(logits_UV, softmax, target_U, dense_U, hot_U, shard)


# ---------------------------------------------------------------- plain torch


def above_max(logits_UV: Tensor, max_U: Tensor) -> Tensor:
    """Returns logit - max in the type to compute with, as a new tensor; minus infinity becomes NEGATIVE."""
    wide = torch.promote_types(logits_UV.dtype, torch.float32)
    return torch.clamp(logits_UV.to(wide), min=NEGATIVE).sub_(max_U[:, None])


def sweep_plain(logits_UV: Tensor, target_U: Tensor, shard: VocabShard) -> Tensor:
    rows, columns = logits_UV.shape
    wide = torch.promote_types(logits_UV.dtype, torch.float32)
    valid = shard.valid(columns)
    if valid == 0:
        zero_U = torch.zeros(rows, dtype=wide, device=logits_UV.device)
        return torch.stack([zero_U + NEGATIVE, zero_U, zero_U, zero_U])
    max_U = logits_UV[:, :valid].amax(1).to(wide).clamp_min(NEGATIVE)
    above_UV = above_max(logits_UV[:, :valid], max_U).mul_(shard.scale)
    exp_UV = above_UV.exp()
    exp_sum_U = exp_UV.sum(1)
    entropy_sum_U = above_UV.mul_(exp_UV).sum(1)
    local_U, here_U = shard.own(target_U, columns)
    logit_U = logits_UV.gather(1, local_U[:, None])[:, 0].to(wide).clamp_min(NEGATIVE)
    return torch.stack([max_U, exp_sum_U, logit_U.where(here_U, logit_U.new_zeros(())), entropy_sum_U])


def write_gradient_plain(
    logits_UV: Tensor,
    softmax: RowSoftmax,
    target_U: Tensor,
    dense_U: Tensor,
    hot_U: Tensor,
    shard: VocabShard,
) -> None:
    valid = shard.valid(logits_UV.shape[1])
    gradient_UV = above_max(logits_UV[:, :valid], softmax.max_U).mul_(shard.scale)
    gradient_UV.sub_(softmax.log_sum_U[:, None]).exp_().mul_(-shard.scale * dense_U[:, None])
    gradient_UV[(dense_U == 0) & (hot_U == 0)] = 0.0
    put_gradient_(logits_UV, gradient_UV, target_U, hot_U * shard.scale, shard)


def put_gradient_(
    logits_UV: Tensor, gradient_UV: Tensor, target_U: Tensor, hot_U: Tensor, shard: VocabShard
) -> None:
    """Adds `hot_U` at the targets, and puts the gradient where the logits are; 0 in padding columns."""
    columns, valid = logits_UV.shape[1], gradient_UV.shape[1]
    local_U, here_U = shard.own(target_U, columns)
    rows = here_U.nonzero()[:, 0]
    gradient_UV[rows, local_U[rows]] += hot_U[rows].to(gradient_UV.dtype)
    logits_UV[:, :valid] = gradient_UV
    logits_UV[:, valid:] = 0.0
