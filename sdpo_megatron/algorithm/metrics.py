"""What a step reports, under the names that the Tinker recipe of SDPO uses, so that its curves and ours can be laid
over one another."""

from collections.abc import Iterable, Sequence

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


def _mean(values: Iterable[float]) -> float:
    numbers = [float(value) for value in values]
    return sum(numbers) / len(numbers) if numbers else 0.0
