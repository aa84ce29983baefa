"""Problems are tokenised on rank 0, and what all ranks need of that is shared."""

from types import SimpleNamespace
from typing import Any

import pytest

from sdpo_megatron.config import EvalSettings, RolloutSettings
from sdpo_megatron.evaluate import Evaluator
from sdpo_megatron.records import Problem
from sdpo_megatron.run import Run

PROBLEMS = [
    Problem(id=f"p{i}", messages=[{"role": "user", "content": "?"}], answer="a", canonical=True)
    for i in range(4)
]


class Rank:
    """Rank 0, or one to which rank 0 sends `from_main`."""

    def __init__(self, is_main: bool, from_main: Any = None):
        self.is_main, self.from_main = is_main, from_main

    def everywhere(self, work):
        return work()

    def share(self, value):
        return value if self.is_main else self.from_main


class CountingChat:
    calls = 0
    opens = False

    def prompt_ids(self, messages):
        self.calls += 1
        return [1, 2]

    def answer_ids(self, text):
        self.calls += 1
        return [3]

    def opens_thought(self, prompt_ids):
        return self.opens


@pytest.mark.parametrize("is_main", [True, False])
def test_a_steps_requests(is_main: bool):
    chat: Any = CountingChat()
    run: Any = SimpleNamespace(
        parallel=Rank(is_main),
        chat=chat,
        rollout=RolloutSettings(group_size=3),
        _problems_of=lambda step: PROBLEMS[:2],
    )
    requests = Run.requests(run, 0)
    assert [request.id for request in requests] == (["p0", "p1"] if is_main else [])
    assert chat.calls == (2 if is_main else 0)


@pytest.mark.parametrize("is_main", [True, False])
def test_an_evaluations_requests_and_answers(is_main: bool):
    chat: Any = CountingChat()
    submitted, scored = [], []
    serving: Any = SimpleNamespace(
        submit=lambda requests, on_response: submitted.extend(requests) or "a ticket",
        collect=lambda ticket: [] if ticket == "a ticket" else None,
    )
    policy: Any = SimpleNamespace(response_logprobs=lambda pairs: scored.extend(pairs) or [[0.0]])
    parallel: Any = Rank(is_main, from_main=[[[1, 2], [3]]])
    settings = EvalSettings(problems=2, exact_problems=1)
    thread: Any = SimpleNamespace(grade=None)
    evaluator = Evaluator(
        PROBLEMS,
        thread,
        chat,
        serving,
        policy,
        parallel,
        settings=settings,
        max_tokens=5,
        success_threshold=0.5,
    )
    assert evaluator.evaluate() == ({"test/exact_answer_prob": 1.0}, [])
    assert [request.id for request in submitted] == (["eval p0", "eval p1"] if is_main else [])
    assert scored == [([1, 2], [3])]
    assert chat.calls == (4 if is_main else 0)


def test_an_answer_behind_a_prompt_that_began_a_thought_is_not_measured():
    chat: Any = CountingChat()
    chat.opens = True
    unused: Any = None
    rank: Any = Rank(True)
    settings = EvalSettings(problems=0, exact_problems=2)
    evaluator = Evaluator(
        PROBLEMS, unused, chat, unused, unused, rank, settings=settings, max_tokens=5, success_threshold=0.5
    )
    assert evaluator.evaluate() == ({}, [])
