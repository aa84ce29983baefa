"""What a step reports, under the names that the Tinker recipe of SDPO uses, so that its curves and ours can be laid
over one another."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from sdpo_megatron.records import Group


def environment_metrics(groups_P: Sequence[Group], success_threshold: float) -> dict[str, float]:
    """Returns means over all responses of graded groups.

    `correct` is the share with reward >= success_threshold, `truncated_fraction` that of answers cut off by length,
    `unfinished_thought_fraction` that of responses without an answer, because they ended inside a thought; lengths are
    in tokens, thoughts included; `ungraded_fraction` is the share of responses that could not be graded, which nothing
    else here counts. The environment's own numbers are means over the responses that have them. Where there is no
    response the result is empty.
    """
    size = sum(group.size for group in groups_P)
    if not size:
        return {}
    metrics = {"ungraded_fraction": sum(len(group.ungraded) for group in groups_P) / size}
    rollouts = [rollout for group in groups_P for rollout in group.rollouts_G]
    grades = [grade for group in groups_P for grade in group.grades_G]
    if grades:
        own: defaultdict[str, list[float]] = defaultdict(list)
        for grade in grades:
            for key, value in grade.metrics.items():
                own[key].append(value)
        lengths = [len(rollout.response_ids_T) for rollout in rollouts]
        metrics |= {key: mean(values) for key, values in own.items()} | {
            "correct": mean(grade.reward >= success_threshold for grade in grades),
            "reward/total": mean(grade.reward for grade in grades),
            "format_fraction": mean(grade.correct_format for grade in grades),
            "truncated_fraction": mean(rollout.finish_reason == "length" for rollout in rollouts),
            "unfinished_thought_fraction": mean(rollout.finish_reason == "thinking" for rollout in rollouts),
            "response_length/mean": mean(lengths),
            "response_length/max": float(max(lengths)),
        }
    return {f"env/all/{key}": value for key, value in metrics.items()}


def group_metrics(groups_P: Sequence[Group], success_threshold: float) -> dict[str, float]:
    """Returns how many groups hold a success that siblings can learn from."""
    graded_P = [group.grades_G for group in groups_P if group.grades_G]
    rates_P = [mean(grade.reward >= success_threshold for grade in grades_G) for grades_G in graded_P]
    with_success = sum(rate > 0 for rate in rates_P)
    return {
        "sdpo/groups_total": float(len(groups_P)),
        "sdpo/groups_with_success": float(with_success),
        "sdpo/success_fraction": with_success / max(1, len(groups_P)),
        "sdpo/mean_group_success_rate": mean(rates_P),
    }


def mean(values: Iterable[float]) -> float:
    """Returns 0 for no values."""
    numbers = [float(value) for value in values]
    return sum(numbers) / len(numbers) if numbers else 0.0
