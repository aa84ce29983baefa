"""Samples of graded responses: ids, prompts, room, and what is counted."""

import copy

import pytest

from sdpo_megatron.algorithm.reprompt import RepromptSettings, Template, build_samples, reprompt_metrics
from sdpo_megatron.algorithm.reprompt.samples import prompt_limit
from sdpo_megatron.algorithm.thoughts import MARKERS
from sdpo_megatron.chat import Chat
from sdpo_megatron.records import Grade, Group, Hints, Message, Problem, Rollout, Ungraded, WeightSpan
from tests.tiny_model import make_tokenizer

PROBLEM = Problem(
    id="p",
    messages=[
        Message(role="system", content="Be brief."),
        Message(role="user", content="First?"),
        Message(role="assistant", content="One."),
        Message(role="user", content="Second?"),
    ],
)


TOKENIZER = make_tokenizer()


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
        "sdpo/teacher_shortened_count": 0,
        "sdpo/teacher_no_room_count": 0,
    }


@pytest.mark.parametrize(("rule", "shown"), [("never", None), ("when_alone", 1), ("always", 1)])
def test_a_sample_knows_where_it_was_its_own_demonstration(rule, shown):
    settings = RepromptSettings(own_success=rule)
    samples, _ = build([ONE_OF_THREE], 4, settings=settings)
    assert [s.demonstration_id for s in samples] == [1, shown, 1]


TWO_OF_FOUR_OF_THREE = group(("b", 1, ""), ("c", 0.5, ""), ("d", 0.49, ""))


def long_responses(tokens: int) -> Group:
    return Group(
        problem=PROBLEM,
        rollouts_G=[rollout(text, tokens) for text in "abc"],
        grades_G=[Grade(reward=reward) for reward in (0, 1, 0)],
    )


@pytest.mark.parametrize(("length", "fit"), [(2, 8), (3, 7), (5, 5)])
def test_a_response_beyond_the_context_is_not_scored(length: int, fit: int):
    """A prompt may have half of the context, 10 tokens, where a response of 8 leaves less."""
    samples, metrics = build([long_responses(8)], length)
    assert [s.teacher_tokens for s in samples] == [fit, 0, fit]
    truncated = 2 if fit < 8 else 0
    assert metrics["sdpo/teacher_truncated_count"] == truncated
    assert metrics["sdpo/teacher_truncated_frac"] == truncated / 2
    assert metrics["sdpo/teacher_truncated_tokens_avg"] == 8 - fit
    assert metrics["sdpo/trajectories_trained"] == 2
    assert metrics["sdpo/teacher_no_room_count"] == 0


@pytest.mark.parametrize(
    ("context", "tokens", "most", "limit"),
    [(2048, 500, None, 1548), (2048, 1800, None, 1024), (2048, 500, 10240, 1548), (20480, 500, 10240, 10240)],
)
def test_how_long_a_prompt_may_be(context: int, tokens: int, most: int | None, limit: int):
    assert prompt_limit(RepromptSettings(max_prompt_length=most), context, tokens) == limit


def test_without_room_for_a_prompt_there_is_no_teacher_and_it_is_counted():
    samples, metrics = build([long_responses(3)], 8)
    assert [s.teacher_prompt_ids for s in samples] == [None, None, None]
    assert [s.demonstration_id for s in samples] == [None, None, None]
    assert [s.hints_lost for s in samples] == [True, False, True]
    assert metrics["sdpo/teacher_no_room_count"] == 2
    assert metrics["sdpo/teacher_shortened_count"] == metrics["sdpo/trajectories_trained"] == 0


def test_shortened_demonstrations_are_counted_and_stay_demonstrations():
    solution = " ".join(f"word{k}" for k in range(200))
    shared = group(("a", 0, ""), (solution, 1, ""), ("c", 0, ""))
    calls = []

    def words(messages: list[Message]) -> list[int]:
        calls.append(messages)
        return list(range(len(messages[-1]["content"].split())))

    samples = build_samples(0, shared, RepromptSettings(own_success="when_alone"), show, words, 103)
    metrics = reprompt_metrics(samples)
    assert [s.demonstration_id for s in samples] == [1, 1, 1]
    assert metrics["sdpo/teacher_shortened_count"] == metrics["sdpo/trajectories_trained"] == 3
    assert metrics["sdpo/teacher_no_room_count"] == metrics["sdpo/teacher_truncated_count"] == 0
    prompts = [s.teacher_prompt_ids for s in samples]
    assert prompts[0] is prompts[1] is prompts[2], "shortened once for all who read it"
    assert prompts[0] is not None and 90 <= len(prompts[0]) <= 100
    assert len(calls) <= 7


def test_a_response_that_is_masked_everywhere_is_not_counted_as_trained():
    masked = Group(
        problem=PROBLEM,
        rollouts_G=[rollout("a", trained=False), rollout("b")],
        grades_G=[Grade(reward=0), Grade(reward=1)],
    )
    assert build([masked], 4)[1]["sdpo/trajectories_trained"] == 0


@pytest.mark.parametrize("tags", ["text", "tokens", "special tokens"])
@pytest.mark.parametrize(("opening", "closing"), MARKERS)
def test_no_teacher_reads_a_thought_whatever_the_familys_tags(opening: str, closing: str, tags: str):
    """From the sampled ids to the prompt's."""
    tokenizer = copy.deepcopy(TOKENIZER)
    if tags != "text":
        tokenizer.add_tokens([opening, closing], special_tokens=tags == "special tokens")
    chat = Chat(tokenizer)
    answers = []
    for text in (f"{opening}secret{closing}\n\nfour", f"secret{closing}five", f"{opening}secret"):
        ids = [*tokenizer.encode(text, add_special_tokens=False), *chat.answer_ids("")]
        answers.append(chat.separate(chat.prompt_ids(PROBLEM.messages), ids).answer)
    assert answers == ["four", "five", ""]
    graded = group(("", 0, "F"), *((answer, 1 - k, "F") for k, answer in enumerate(answers)))
    settings = RepromptSettings(feedback="always", show_attempt=True, own_success="always")
    samples = build_samples(0, graded, settings, Template().show, chat.prompt_ids, 1024)
    prompts = [chat.decode_all(list(s.teacher_prompt_ids or [])) for s in samples]
    assert all("secret" not in prompt and opening not in prompt for prompt in prompts)
    assert "four" in prompts[0] and "five" in prompts[2]


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
