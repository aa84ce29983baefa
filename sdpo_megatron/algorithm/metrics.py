"""What a step reports, under the names that the Tinker recipe of SDPO uses, so that its curves and ours can be laid
over one another."""

from collections.abc import Iterable, Sequence

from sdpo_megatron.records import Grade, Group, Rollout


def environment_metrics(
    groups_P: Sequence[Group], success_threshold: float, prefix: str = ""
) -> dict[str, float]:
    """Returns means over all responses of graded groups; `prefix` is "" for training and "test/" for held-out
    problems.

    `correct` is the share with reward >= success_threshold, `truncated_fraction` that of answers cut off by length,
    `unfinished_thought_fraction` that of responses without an answer, because they ended inside a thought; lengths are
    in tokens, thoughts included; `ungraded_fraction` is the share of responses that could not be graded, which nothing
    else here counts. The environment's own numbers are means over the responses that have them. Where there is no
    response the result is empty.
    """
    name = f"{prefix}env/all"
    size = sum(group.size for group in groups_P)
    ungraded = {f"{name}/ungraded_fraction": sum(len(group.ungraded) for group in groups_P) / max(1, size)}
    pairs = [pair for group in groups_P for pair in zip(group.rollouts_G, group.grades_G, strict=True)]
    if not pairs:
        return ungraded if size else {}
    own = {key: [grade.metrics[key] for _, grade in pairs if key in grade.metrics] for key in _keys(pairs)}
    lengths = [len(rollout.response_ids_T) for rollout, _ in pairs]
    return (
        ungraded
        | {f"{name}/{key}": _mean(values) for key, values in own.items()}
        | {
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
    )


def group_metrics(groups_P: Sequence[Group], success_threshold: float) -> dict[str, float]:
    """Returns how many groups hold a success that siblings can learn from."""
    graded_P = [group.grades_G for group in groups_P if group.grades_G]
    rates_P = [_mean(grade.reward >= success_threshold for grade in grades_G) for grades_G in graded_P]
    with_success = sum(rate > 0 for rate in rates_P)
    return {
        "sdpo/groups_total": float(len(groups_P)),
        "sdpo/groups_with_success": float(with_success),
        "sdpo/success_fraction": with_success / max(1, len(groups_P)),
        "sdpo/mean_group_success_rate": _mean(rates_P),
    }


def _keys(pairs: Iterable[tuple[Rollout, Grade]]) -> list[str]:
    """The names of the environment's own numbers, in the order in which they are met."""
    return list(dict.fromkeys(key for _, grade in pairs for key in grade.metrics))


def _mean(values: Iterable[float]) -> float:
    numbers = [float(value) for value in values]
    return sum(numbers) / len(numbers) if numbers else 0.0
