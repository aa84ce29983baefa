"""Samples of graded responses: ids, prompts, room, and what is counted."""

import pytest

from sdpo_megatron.algorithm.reprompt import RepromptSettings, build_samples, reprompt_metrics
from sdpo_megatron.records import Grade, Group, Hints, Message, Problem, Rollout, WeightSpan

PROBLEM = Problem(
    id="p",
    messages=[
        Message(role="system", content="Be brief."),
        Message(role="user", content="First?"),
        Message(role="assistant", content="One."),
        Message(role="user", content="Second?"),
    ],
)


def rollout(text: str, tokens: int = 3, trained: bool = True) -> Rollout:
    return Rollout(
        prompt_ids=[1, 2],
        response_ids_T=list(range(10, 10 + tokens)),
        rollout_logprobs_T=[-0.5] * tokens,
        loss_mask_T=[int(trained)] * tokens,
        weight_spans=[WeightSpan(start=0, end=tokens, version=0)],
        finish_reason="stop",
        text=text,
    )


def group(*graded: tuple[str, float, str]) -> Group:
    return Group(
        problem=PROBLEM,
        rollouts_G=[rollout(text) for text, _, _ in graded],
        grades_G=[Grade(reward=reward, feedback=feedback) for _, reward, feedback in graded],
    )


def show(problem: Problem, hints: Hints) -> list[Message]:
    return [Message(role="user", content=f"{hints.solution}|{hints.feedback}")]


ONE_OF_THREE = group(("a", 0, ""), ("b", 1, ""), ("c", 0, ""))


def prompt_of_length(n: int):
    return lambda messages: list(range(n))


def build(groups, length, max_context_length=10, settings=RepromptSettings()):  # noqa: B008  it is frozen
    """(samples, metrics)."""
    samples = [
        sample
        for p, group in enumerate(groups)
        for sample in build_samples(p, group, settings, show, prompt_of_length(length), max_context_length)
    ]
    return samples, reprompt_metrics(samples)


def test_samples_carry_ids_prompts_and_group_advantages():
    samples, metrics = build([ONE_OF_THREE, TWO_OF_FOUR_OF_THREE], 4)
    assert [s.id for s in samples] == [0, 1, 2, 3, 4, 5]
    assert samples[1].teacher_prompt_ids is None and samples[1].teacher_tokens == 0
    assert samples[0].teacher_prompt_ids == [0, 1, 2, 3] and samples[0].teacher_tokens == 3
    assert samples[0].prompt_ids == [1, 2] and samples[0].response_ids_T == [10, 11, 12]
    assert [s.demonstration_id for s in samples] == [1, None, 1, 4, 3, 3]
    assert [s.group_advantage for s in samples[:3]] == pytest.approx([-1 / 3, 2 / 3, -1 / 3])
    assert metrics == {
        "sdpo/trajectories_total": 6,
        "sdpo/trajectories_trained": 5,
        "sdpo/teacher_truncated_count": 0,
        "sdpo/teacher_truncated_frac": 0,
        "sdpo/teacher_truncated_tokens_avg": 0,
    }


@pytest.mark.parametrize(("rule", "shown"), [("never", None), ("when_alone", 1), ("always", 1)])
def test_a_sample_knows_where_it_was_its_own_demonstration(rule, shown):
    settings = RepromptSettings(own_success=rule)
    samples, _ = build([ONE_OF_THREE], 4, settings=settings)
    assert [s.demonstration_id for s in samples] == [1, shown, 1]


TWO_OF_FOUR_OF_THREE = group(("b", 1, ""), ("c", 0.5, ""), ("d", 0.49, ""))


@pytest.mark.parametrize(("length", "fit"), [(7, 3), (8, 2), (9, 1), (10, 0), (11, 0)])
def test_response_beyond_the_context_is_not_scored(length, fit):
    samples, metrics = build([ONE_OF_THREE], length)
    assert [s.teacher_tokens for s in samples] == [fit, 0, fit]
    truncated = 2 if fit < 3 else 0
    assert metrics["sdpo/teacher_truncated_count"] == truncated
    assert metrics["sdpo/teacher_truncated_frac"] == truncated / 2
    assert metrics["sdpo/teacher_truncated_tokens_avg"] == 3 - fit
    assert metrics["sdpo/trajectories_trained"] == (2 if fit else 0)


def test_a_response_that_is_masked_everywhere_is_not_counted_as_trained():
    masked = Group(
        problem=PROBLEM,
        rollouts_G=[rollout("a", trained=False), rollout("b")],
        grades_G=[Grade(reward=0), Grade(reward=1)],
    )
    assert build([masked], 4)[1]["sdpo/trajectories_trained"] == 0


def test_no_groups_no_samples():
    assert build([], 4)[0] == []
