"""What a step reports about learning: means, over trained tokens, of what the last pipeline stage recorded.

Each rank adds up its own tokens, and only the sums travel."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sdpo_megatron.algorithm.losses.base import Loss
from sdpo_megatron.algorithm.quantiles import quantiles
from sdpo_megatron.records import Sample

_QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
_POLICY = {
    "entropy": "entropy",
    "ratio": "ratio",
    "clip_fraction": "clipped",
    "rollout_correction": "correction",
}
"""Metrics of the policy, and what was recorded under which name for them."""
DEPTHS = (0, 16, 128, 1024, 8192)
"""Where in a response the parts begin over which the gap to the server is told apart: it grows with depth where caches
or positions are wrong."""


class Everyone(Protocol):
    """All ranks that have tokens of a step."""

    def owned_total(self, values_T: Tensor) -> Tensor: ...

    def largest(self, value: float) -> float: ...


@dataclass(frozen=True, kw_only=True)
class OwnTokens:
    """A rank's tokens, flat over its samples' responses, in order, [B] each."""

    samples: Sequence[Sample]
    seen: Mapping[str, Tensor]
    """What was recorded: `computed`, `student`, `teacher`, `advantage`, `divergence`, `entropy`, `mass`, `loss`,
    `ratio`, `clipped`, `correction`."""
    weights_B: Tensor
    teacher_mask_B: Tensor
    rollout_logprobs_B: Tensor
    old_logprobs_B: Tensor


@dataclass(frozen=True, kw_only=True)
class WholeStep:
    """What is known of all ranks' tokens."""

    weight: float
    """The weight of all tokens, those without any gradient included."""
    tokens: int
    """All response tokens."""
    groups: int


def learning_metrics(
    own: OwnTokens, whole: WholeStep, *, loss: Loss, group_size: int, everyone: Everyone
) -> dict[str, float]:
    """Returns a step's metrics, on every rank; all of `everyone` call it together.

    The loss is divided by the weight of all tokens, those without any gradient included. A mean over no tokens is left
    out: in a step without signal, all that concerns the models."""
    trained_B = own.weights_B * own.seen["computed"]
    active_B, taught_B = trained_B > 0, trained_B * own.teacher_mask_B
    # trainer - server, in nats
    log_ratio_T = (own.old_logprobs_B - own.rollout_logprobs_B)[active_B].double()
    largest = float(log_ratio_T.abs().max()) if len(log_ratio_T) else 0.0
    sums = _total(
        {
            **_model_sums(own, trained_B),
            **_gap_sums(own.samples, active_B, log_ratio_T),
            **_teaching_sums(own, taught_B),
            "groups": _groups_with_signal(own.samples, trained_B, group_size, whole.groups),
        },
        everyone,
    )
    trained = float(sums["trained_weight"])
    metrics: dict[str, float | None] = {
        "loss": float(sums["loss"]) / max(whole.weight, 1.0),
        **{f"policy/{name}": _ratio(sums[seen], trained) for name, seen in _POLICY.items()},
        "perf/response_tokens": float(whole.tokens),
        "perf/trained_tokens": trained,
        "signal/token_fraction": float(sums["trained"]) / max(whole.tokens, 1),
        "signal/group_fraction": float((sums["groups"] > 0).sum()) / max(whole.groups, 1),
        **_rollout_gap(sums, everyone.largest(largest)),
    }
    if loss.teacher_views:
        metrics |= _teaching(sums, own.seen["divergence"][taught_B > 0], loss, everyone)
    return {key: value for key, value in metrics.items() if value is not None}


def _total(own: Mapping[str, Tensor], everyone: Everyone) -> dict[str, Tensor]:
    """Returns the sums over all ranks, which travel together."""
    flat = everyone.owned_total(torch.cat([values.double().view(-1) for values in own.values()]))
    return dict(zip(own, flat.split([values.numel() for values in own.values()]), strict=True))


def _model_sums(own: OwnTokens, trained_B: Tensor) -> dict[str, Tensor]:
    return {
        "loss": own.seen["loss"].double().sum(),
        "trained_weight": trained_B.double().sum(),
        "trained": (trained_B > 0).sum(),
        **{name: _weighted(own.seen[name], trained_B) for name in _POLICY.values()},
    }


def _gap_sums(samples: Sequence[Sample], active_B: Tensor, log_ratio_T: Tensor) -> dict[str, Tensor]:
    none = torch.zeros(0, dtype=torch.int64)
    depth_B = torch.cat([none, *(torch.arange(len(sample.response_ids_T)) for sample in samples)])
    part_T = torch.bucketize(depth_B[active_B], torch.tensor(DEPTHS[1:]), right=True)
    return {
        "gap": log_ratio_T.abs().sum(),
        "k3": (torch.expm1(log_ratio_T) - log_ratio_T).sum(),
        "gap_by_depth": torch.zeros(len(DEPTHS)).double().index_add(0, part_T, log_ratio_T.abs()),
        "tokens_by_depth": torch.bincount(part_T, minlength=len(DEPTHS)),
    }


def _rollout_gap(sums: Mapping[str, Tensor], largest: float) -> dict[str, float]:
    """How far the trainer's log-probabilities are from the server's, over trained tokens, in nats.

    `depth_N` is the mean over the tokens from the N-th of their response to the next depth. `kl_k3` estimates
    KL(server || trainer) by r - 1 - log r, r = exp(trainer - server), which is never negative (J. Schulman,
    "Approximating KL divergence", 2020)."""
    tokens = float(sums["trained"])
    if not tokens:
        return {}
    by_depth = zip(DEPTHS, sums["gap_by_depth"].tolist(), sums["tokens_by_depth"].tolist(), strict=True)
    return {
        **{f"rollout_gap/depth_{depth}": gap / count for depth, gap, count in by_depth if count},
        "rollout_gap/mean": float(sums["gap"]) / tokens,
        "rollout_gap/max": largest,
        "rollout_gap/kl_k3": float(sums["k3"]) / tokens,
    }


def _teaching_sums(own: OwnTokens, taught_B: Tensor) -> dict[str, Tensor]:
    lengths = torch.tensor([len(sample.response_ids_T) for sample in own.samples], dtype=torch.int64)
    success = torch.tensor([float(sample.success) for sample in own.samples])
    right_B = taught_B * torch.repeat_interleave(success, lengths)
    gap_B = own.seen["teacher"] - own.seen["student"]
    return {
        "taught_weight": taught_B.double().sum(),
        "taught": (taught_B > 0).sum(),
        "advantage": own.seen["advantage"][taught_B > 0].double().sum(),
        "right_weight": right_B.double().sum(),
        "right": _weighted(gap_B, right_B),
        "wrong_weight": (taught_B - right_B).double().sum(),
        "wrong": _weighted(gap_B, taught_B - right_B),
        "divergence": _weighted(own.seen["divergence"], taught_B),
        "mass": _weighted(own.seen["mass"], taught_B),
    }


def _teaching(
    sums: Mapping[str, Tensor], divergences_T: Tensor, loss: Loss, everyone: Everyone
) -> dict[str, float | None]:
    """The teacher's log-ratio at the sampled tokens, and the divergence, over trained tokens that have a teacher."""
    taught = float(sums["taught_weight"])
    metrics: dict[str, float | None] = {
        "sdpo/mean_advantage": _ratio(sums["advantage"], float(sums["taught"])),
        "sdpo/advantage_right": _ratio(sums["right"], float(sums["right_weight"])),
        "sdpo/advantage_wrong": _ratio(sums["wrong"], float(sums["wrong_weight"])),
    }
    if loss.compares_distributions:
        metrics["sdpo/divergence/mean"] = _ratio(sums["divergence"], taught)
        found = quantiles(divergences_T, list(_QUANTILES.values()), everyone.owned_total)
        metrics |= {f"sdpo/divergence/{name}": value for name, value in zip(_QUANTILES, found, strict=False)}
        mass = _ratio(sums["mass"], taught)
        if loss.top_k_tokens and mass is not None:
            metrics |= {"sdpo/top_k_mass": mass, "sdpo/tail_mass": max(0.0, 1.0 - mass)}
    return metrics


def _groups_with_signal(samples: Sequence[Sample], trained_B: Tensor, group_size: int, groups: int) -> Tensor:
    """For each group, how many of this rank's tokens were learned from."""
    lengths = torch.tensor([len(sample.response_ids_T) for sample in samples], dtype=torch.int64)
    group_of = torch.tensor([sample.id // group_size for sample in samples], dtype=torch.int64)
    counts = torch.zeros(groups, dtype=torch.int64)
    return counts.index_add(0, torch.repeat_interleave(group_of, lengths), (trained_B > 0).long())


def _weighted(values_B: Tensor, weights_B: Tensor) -> Tensor:
    return (values_B.double() * weights_B).sum()


def _ratio(total: Tensor, weight: float) -> float | None:
    return float(total) / weight if weight > 0 else None
