"""From a response's ids to its grade: the answer is graded, whatever was thought."""

import pytest

from sdpo_megatron.chat import Chat
from sdpo_megatron.envs.graders import GRADERS
from sdpo_megatron.envs.grading.step import Grading
from sdpo_megatron.records import FinishReason, Grade, Group, Message, Problem, Rollout
from tests.graders import AtOnce
from tests.thinking_model import thinking_tokenizer
from tests.tiny_model import CHAT_TEMPLATE, make_tokenizer

ASK = [Message(role="user", content="What is 2 + 2?")]


GRADER = AtOnce(lambda problem, rollout: GRADERS[problem.grader](problem, rollout.text))


@pytest.fixture(scope="module", params=["special tokens", "tokens", "text"])
def tokenizer(request):
    return (
        make_tokenizer() if request.param == "text" else thinking_tokenizer(special=request.param[0] == "s")
    )


def graded(tokenizer, grader: str, response: str, opens: bool) -> tuple[Rollout, Grade]:
    """As the sampler and the loop do it."""
    tokenizer.chat_template = (
        CHAT_TEMPLATE.replace("assistant\n", "assistant\n<think>\n") if opens else CHAT_TEMPLATE
    )
    chat = Chat(tokenizer)
    prompt_ids, ids = chat.prompt_ids(ASK), chat.answer_ids(response)
    separated = chat.separate(prompt_ids, ids)
    finish: FinishReason = "stop" if separated.closed else "thinking"
    rollout = Rollout(
        prompt_ids=prompt_ids,
        response_ids_T=ids,
        rollout_logprobs_T=[-1.0] * len(ids),
        loss_mask_T=[1] * len(ids),
        weight_spans=[],
        finish_reason=finish,
        text=separated.answer,
        thought=separated.thought,
    )
    problem = Problem(id="p", messages=ASK, answer="4", grader=grader)
    grading: Grading[Group] = Grading(
        [problem], GRADER, 1, lambda p, group, prepared: prepared.set_result(group)
    )
    grading.begin((0, 0), rollout)
    (group,) = grading.join()
    assert grading.prepared() == [group]
    return rollout, group.grades_G[0]


@pytest.mark.parametrize(
    ("grader", "response", "opens", "reward"),
    [
        ("exact", "<think>x</think>\n\n4", False, 1.0),
        ("exact", "x\n</think>\n\n4", True, 1.0),
        ("exact", "4", False, 1.0),
        ("exact", "<think>I guess 7</think>4", False, 1.0),
        ("exact", "<think>4</think>7", False, 0.0),
        ("last_number", "<think>4</think>seven", False, 0.0),
        ("last_number", "<think>7</think>It is 4.", False, 1.0),
    ],
)
def test_graders_read_the_answer_alone(tokenizer, grader, response, opens, reward):
    rollout, grade = graded(tokenizer, grader, response, opens)
    assert grade.reward == reward
    assert rollout.finish_reason == "stop" and "think" not in rollout.text + rollout.thought


@pytest.mark.parametrize("grader", ["exact", "last_number", "equation"])
@pytest.mark.parametrize(("response", "opens"), [("4", True), ("<think>it is 4", False), ("4<think>", False)])
def test_a_thought_that_never_ended_is_no_answer(tokenizer, grader, response, opens):
    rollout, grade = graded(tokenizer, grader, response, opens)
    assert (rollout.finish_reason, rollout.text) == ("thinking", "")
    tokens = len(rollout.response_ids_T)
    assert grade == Grade(
        reward=0.0,
        feedback=f"No answer came: the response ended after {tokens} tokens, inside its thought.",
        correct_format=False,
    )
