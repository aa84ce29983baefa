from dataclasses import replace

import pytest

from sdpo_megatron.algorithm.reprompt import (
    RepromptSettings,
    build_samples,
    reprompt_metrics,
    teacher_conversations,
)
from sdpo_megatron.records import Grade, Group, Message, Problem, Rollout, Ungraded, WeightSpan

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


def show(problem: Problem, solution: str | None, feedback: str | None) -> list[Message]:
    return [Message(role="user", content=f"{solution}|{feedback}")]


def shown(group: Group, **settings) -> list[str | None]:
    conversations = teacher_conversations(group, RepromptSettings(**settings), show)
    return [None if c is None else c[0]["content"] for c in conversations]


TWO_OF_FOUR = group(("a", 0, ""), ("b", 1, ""), ("c", 0.5, ""), ("d", 0.49, ""))
ONE_OF_THREE = group(("a", 0, ""), ("b", 1, ""), ("c", 0, ""))


def test_demonstration_is_the_first_other_success():
    assert shown(TWO_OF_FOUR) == ["b|None", "c|None", "b|None", "b|None"]


@pytest.mark.parametrize(
    ("rule", "two", "one"),
    [
        ("never", "c|None", None),
        ("when_alone", "c|None", "b|None"),
        ("always", "b|None", "b|None"),
    ],
)
def test_own_success_rule(rule, two, one):
    assert shown(TWO_OF_FOUR, own_success=rule)[1] == two
    assert shown(ONE_OF_THREE, own_success=rule) == ["b|None", one, "b|None"]


def test_always_shows_every_success_itself():
    assert shown(TWO_OF_FOUR, own_success="always") == ["b|None", "b|None", "c|None", "b|None"]


def test_threshold_decides_what_succeeds():
    assert shown(TWO_OF_FOUR, success_reward_threshold=0.49) == ["b|None", "c|None", "b|None", "b|None"]
    assert shown(TWO_OF_FOUR, success_reward_threshold=0.6) == ["b|None", None, "b|None", "b|None"]


@pytest.mark.parametrize("rule", ["never", "when_alone", "always"])
def test_nothing_is_known_where_nobody_succeeded_and_nothing_was_said(rule):
    assert shown(group(("a", 0, ""), ("b", 0, "")), own_success=rule) == [None, None]


def test_feedback_of_the_response_itself_and_only_without_a_solution():
    failed = group(("a", 0, "A"), ("b", 0, "B"), ("c", 0, ""))
    assert shown(failed) == ["None|A", "None|B", None]
    mixed = group(("a", 0, "A"), ("b", 1, "praise"))
    assert shown(mixed) == ["b|None", None]
    assert shown(mixed, environment_feedback_only_without_solution=False) == ["b|A", None]
    assert shown(failed, include_environment_feedback=False) == [None, None, None]


def test_a_success_without_an_answer_is_no_demonstration():
    """Whatever its reward: a threshold of 0 makes a success of everything."""
    no_answer = group(("", 0, ""), ("x", 0, ""), ("b", 0, ""))
    assert shown(no_answer, success_reward_threshold=0.0)[2] == "x|None"


def test_a_demonstration_is_an_answer_without_its_thought():
    thoughtful = group(("4", 1, ""), ("b", 0, ""))
    thoughtful = replace(thoughtful, rollouts_G=[replace(r, thought="hm") for r in thoughtful.rollouts_G])
    assert shown(thoughtful)[1] == "4|None"


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


def test_nothing_is_learned_from_what_could_not_be_graded():
    """It is left out of the group's mean and of the demonstrations, and keeps its place."""
    whole = group(("a", 0, "say"), ("b", 1, ""), ("c", 1, ""))
    left = Ungraded(rollout=rollout("lost"), cause="c")
    partly = Group(
        problem=PROBLEM,
        rollouts_G=whole.rollouts_G,
        grades_G=whole.grades_G,
        ungraded={0: left, 3: left},
    )
    prompts: list[str] = []

    def prompt_ids(messages: list[Message]) -> list[int]:
        prompts.append(messages[0]["content"])
        return [len(prompts)]

    samples = build_samples(2, partly, RepromptSettings(), show, prompt_ids, 100)
    assert [s.id for s in samples] == [10, 11, 12, 13, 14]
    assert [list(s.loss_mask_T) for s in samples] == [[0] * 3, [1] * 3, [1] * 3, [0] * 3, [1] * 3]
    assert [s.demonstration_id for s in samples] == [None, 12, 14, None, 12]
    assert [s.group_advantage for s in samples] == pytest.approx([0, -2 / 3, 1 / 3, 0, 1 / 3])
    assert [s.teacher_prompt_ids is None for s in samples] == [True, False, False, True, False]
    assert not any("lost" in prompt for prompt in prompts)


@pytest.mark.parametrize("graded", [[], [("a", 0, "say")], [("a", 1, "")]])
def test_a_group_with_fewer_than_two_grades_teaches_nothing(graded):
    one = group(*graded)
    left = {g: Ungraded(rollout=rollout("x"), cause="c") for g in range(len(graded), 3)}
    partly = Group(problem=PROBLEM, rollouts_G=one.rollouts_G, grades_G=one.grades_G, ungraded=left)
    settings = RepromptSettings(own_success="always")
    samples = build_samples(0, partly, settings, show, lambda messages: [1], 100)
    assert [s.id for s in samples] == [0, 1, 2]
    assert not any(any(s.loss_mask_T) or s.teacher_prompt_ids or s.group_advantage for s in samples)
