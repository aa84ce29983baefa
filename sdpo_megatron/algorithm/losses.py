"""The policy-gradient loss that both `sdpo` and `grpo` minimise; they differ in the advantages only."""

import torch
from torch import Tensor

_MAX_LOG_RATIO = 20.0
"""exp(20) = 5e8: keeps one token that went astray from turning the sum infinite."""


def clipped_is_loss(
    student_logprobs_T: Tensor,
    rollout_logprobs_T: Tensor,
    advantages_T: Tensor,
    weights_T: Tensor,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped importance-sampling loss (PPO, arXiv 1707.06347, with separate clips), summed over T with
    weights.

    Per token -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), with r = exp(student - rollout). All tensors
    are [T]; only `student_logprobs_T` is differentiated. Tokens of weight 0 have no influence, whatever they
    hold (NaN too). Nothing is divided here: the caller knows the global sum of weights.

    Returns the sum, a scalar, and detached weighted sums to be added over micro-batches and ranks:
    `loss`, `weight`, `ratio`, `clipped` (tokens whose gradient the clip stops), `advantage`.
    """
    active_T = weights_T > 0
    zeros_T = torch.zeros_like(student_logprobs_T)
    log_ratio_T = torch.where(active_T, student_logprobs_T - rollout_logprobs_T.detach(), zeros_T)
    ratio_T = log_ratio_T.clamp(max=_MAX_LOG_RATIO).exp()
    advantages_T = torch.where(active_T, advantages_T.detach(), torch.zeros_like(advantages_T))
    clipped_ratio_T = ratio_T.clamp(1 - clip_low, 1 + clip_high)
    surrogate_T = torch.minimum(ratio_T * advantages_T, clipped_ratio_T * advantages_T)
    loss = -(weights_T * surrogate_T).sum()
    with torch.no_grad():
        stopped_T = clipped_ratio_T * advantages_T < ratio_T * advantages_T
        metrics = {
            "loss": loss.detach(),
            "weight": weights_T.sum(),
            "ratio": (weights_T * ratio_T).sum(),
            "clipped": (weights_T * stopped_T).sum(),
            "advantage": (weights_T * advantages_T).sum(),
        }
    return loss, metrics
