"""What a step reports about learning: means, over trained tokens, of what the last pipeline stage recorded."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sdpo_megatron.algorithm.losses.base import Loss
from sdpo_megatron.algorithm.metrics import mean_advantage, quantiles, rollout_gap
from sdpo_megatron.records import Sample

_QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


def learning_metrics(
    samples: Sequence[Sample],
    seen: Mapping[str, Tensor],
    weights_B: Tensor,
    teacher_mask_B: Tensor,
    rollout_logprobs_B: Tensor,
    old_logprobs_B: Tensor,
    *,
    loss: Loss,
    group_size: int,
) -> dict[str, float]:
    """Returns a step's metrics. All tensors are flat over the samples' response tokens, in order. `seen` holds, per
    token, `computed`, `student`, `teacher`, `advantage`, `divergence`, `entropy`, `mass`, `loss`, `ratio`, `clipped`,
    `correction`.

    The loss is divided by the weight of all tokens, those without any gradient included. A mean over no tokens is left
    out: in a step without signal, all that concerns the models.
    """
    trained_B = weights_B * seen["computed"]
    metrics: dict[str, float | None] = {
        "loss": float(seen["loss"].sum()) / max(float(weights_B.sum()), 1.0),
        "policy/entropy": _mean(seen["entropy"], trained_B),
        "policy/ratio": _mean(seen["ratio"], trained_B),
        "policy/clip_fraction": _mean(seen["clipped"], trained_B),
        "policy/rollout_correction": _mean(seen["correction"], trained_B),
        "perf/response_tokens": float(len(weights_B)),
        "perf/trained_tokens": float(trained_B.sum()),
        **_signal(samples, trained_B, group_size),
        **rollout_gap(
            *(old_logprobs_B, rollout_logprobs_B, trained_B),
            [len(sample.response_ids_T) for sample in samples],
        ),
        **loss.metrics(seen, trained_B),
    }
    if loss.teacher_views:
        metrics |= _teaching(samples, seen, trained_B * teacher_mask_B, loss)
    return {key: value for key, value in metrics.items() if value is not None}


def _teaching(
    samples: Sequence[Sample], seen: Mapping[str, Tensor], taught_B: Tensor, loss: Loss
) -> dict[str, float | None]:
    """The teacher's log-ratio at the sampled tokens, and the divergence, over trained tokens that have a teacher."""
    right_B = _spread(samples, [float(sample.success) for sample in samples])
    gap_B = seen["teacher"] - seen["student"]
    metrics: dict[str, float | None] = {
        **mean_advantage(seen["advantage"], taught_B),
        "sdpo/advantage_right": _mean(gap_B, taught_B * right_B),
        "sdpo/advantage_wrong": _mean(gap_B, taught_B * (1.0 - right_B)),
    }
    if loss.compares_distributions:
        metrics["sdpo/divergence/mean"] = _mean(seen["divergence"], taught_B)
        divergences_T = seen["divergence"][taught_B > 0]
        if len(divergences_T):
            found = quantiles(divergences_T, list(_QUANTILES.values()))
            metrics |= {
                f"sdpo/divergence/{name}": value for name, value in zip(_QUANTILES, found, strict=True)
            }
        mass = _mean(seen["mass"], taught_B)
        if loss.top_k_tokens and mass is not None:
            metrics |= {"sdpo/top_k_mass": mass, "sdpo/tail_mass": max(0.0, 1.0 - mass)}
    return metrics


def _signal(samples: Sequence[Sample], trained_B: Tensor, group_size: int) -> dict[str, float]:
    """Which share of all response tokens, and of all groups, was learned from."""
    tokens = [len(sample.response_ids_T) for sample in samples]
    with_signal = {
        sample.id // group_size
        for sample, row_T in zip(samples, trained_B.split(tokens), strict=True)
        if bool((row_T > 0).any())
    }
    groups = len({sample.id // group_size for sample in samples})
    return {
        "signal/token_fraction": float((trained_B > 0).sum()) / max(len(trained_B), 1),
        "signal/group_fraction": len(with_signal) / max(groups, 1),
    }


def _spread(samples: Sequence[Sample], values: Sequence[float]) -> Tensor:
    counts = torch.tensor([len(sample.response_ids_T) for sample in samples], dtype=torch.int64)
    return torch.repeat_interleave(torch.tensor(values), counts)


def _mean(values_T: Tensor, weights_T: Tensor) -> float | None:
    total = float(weights_T.sum())
    return float((values_T.double() * weights_T).sum()) / total if total > 0 else None
