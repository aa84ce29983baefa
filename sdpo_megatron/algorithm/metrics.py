"""What a step reports, under the names that the Tinker recipe of SDPO uses, so that its curves and ours can be laid
over one another."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sdpo_megatron.records import Group


def environment_metrics(
    groups_P: Sequence[Group], success_threshold: float, prefix: str = ""
) -> dict[str, float]:
    """Returns means over all responses of graded groups; `prefix` is "" for training and "test/" for held-out
    problems.

    `correct` is the share with reward >= success_threshold, `truncated_fraction` that of answers cut off by length,
    `unfinished_thought_fraction` that of responses without an answer, because they ended inside a thought; lengths are
    in tokens, thoughts included. The result is empty where there is no response.
    """
    pairs = [pair for group in groups_P for pair in zip(group.rollouts_G, group.grades_G, strict=True)]
    if not pairs:
        return {}
    lengths = [len(rollout.response_ids_T) for rollout, _ in pairs]
    name = f"{prefix}env/all"
    return {
        f"{name}/correct": _mean(grade.reward >= success_threshold for _, grade in pairs),
        f"{name}/reward/total": _mean(grade.reward for _, grade in pairs),
        f"{name}/format_fraction": _mean(grade.correct_format for _, grade in pairs),
        f"{name}/truncated_fraction": _mean(rollout.finish_reason == "length" for rollout, _ in pairs),
        f"{name}/unfinished_thought_fraction": _mean(
            rollout.finish_reason == "thinking" for rollout, _ in pairs
        ),
        f"{name}/response_length/mean": _mean(lengths),
        f"{name}/response_length/max": float(max(lengths)),
    }


def group_metrics(groups_P: Sequence[Group], success_threshold: float) -> dict[str, float]:
    """Returns how many groups hold a success that siblings can learn from."""
    rates_P = [_mean(grade.reward >= success_threshold for grade in group.grades_G) for group in groups_P]
    with_success = sum(rate > 0 for rate in rates_P)
    return {
        "sdpo/groups_total": float(len(groups_P)),
        "sdpo/groups_with_success": float(with_success),
        "sdpo/success_fraction": with_success / max(1, len(groups_P)),
        "sdpo/mean_group_success_rate": _mean(rates_P),
    }


def mean_advantage(advantages_T: Tensor, weights_T: Tensor) -> dict[str, float]:
    """Returns the mean of the SDPO advantages (nats) over trained tokens; both are [T]. The result is empty where no
    token is trained."""
    trained_T = advantages_T[weights_T > 0].double()
    return {"sdpo/mean_advantage": float(trained_T.mean())} if len(trained_T) else {}


def quantiles(values_T: Tensor, at: Sequence[float]) -> list[float]:
    """Returns the quantiles of one number or more, between two of them by linear interpolation. `torch.quantile` finds
    the same, to the last bit, and refuses more than 2^24 numbers."""
    sorted_T = values_T.sort().values
    last = len(sorted_T) - 1
    found = []
    for q in at:
        place = torch.tensor(q, dtype=values_T.dtype) * last
        # above 2^24 a float32 may round to behind the last
        low, high = min(int(place.floor()), last), min(int(place.ceil()), last)
        found.append(float(torch.lerp(sorted_T[low], sorted_T[high], place - place.floor())))
    return found


DEPTHS = (0, 16, 128, 1024, 8192)
"""Where in a response the parts begin over which the gap to the server is told apart: it grows with depth where caches
or positions are wrong."""


def rollout_gap(
    student_logprobs_T: Tensor, rollout_logprobs_T: Tensor, weights_T: Tensor, lengths: Sequence[int]
) -> dict[str, float]:
    """Returns how far the trainer's log-probabilities are from the server's, over trained tokens; all are [T], in
    nats. `lengths` are those of the responses, one after another, that make up T.

    `depth_N` is the mean over the tokens from the N-th of their response to the next depth. `kl_k3` estimates
    KL(server || trainer) by r - 1 - log r, r = exp(trainer - server), which is never negative (J. Schulman,
    "Approximating KL divergence", 2020). The result is empty where no token is trained.
    """
    active_T = weights_T > 0
    log_ratio_T = (student_logprobs_T.detach() - rollout_logprobs_T)[active_T].double()
    if log_ratio_T.numel() == 0:
        return {}
    depth_T = torch.cat([torch.arange(n) for n in lengths])[active_T]
    part_T = torch.bucketize(depth_T, torch.tensor(DEPTHS[1:]), right=True)
    parts = {
        f"rollout_gap/depth_{DEPTHS[part]}": log_ratio_T[part_T == part].abs().mean().item()
        for part in part_T.unique().tolist()
    }
    return parts | {
        "rollout_gap/mean": log_ratio_T.abs().mean().item(),
        "rollout_gap/max": log_ratio_T.abs().max().item(),
        "rollout_gap/kl_k3": (torch.expm1(log_ratio_T) - log_ratio_T).mean().item(),
    }


def _mean(values: Iterable[float]) -> float:
    numbers = [float(value) for value in values]
    return sum(numbers) / len(numbers) if numbers else 0.0
