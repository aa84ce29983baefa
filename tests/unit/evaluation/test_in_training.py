"""Evaluation in training: rank 0 asks and grades for all, every suite at once."""

from types import SimpleNamespace
from typing import Any

import pytest

from sdpo_megatron.evaluation.in_training import Evaluator
from tests.one_rank import Rank
from tests.unit.evaluation.cases import PROBLEMS, CountingChat, conditions, rollout, suite


class Serving:
    def __init__(self) -> None:
        self.submitted: list[list[str]] = []
        self.collected: list[int] = []

    def submit(self, requests: list[Any], on_response: Any) -> int:
        self.submitted.append([request.id for request in requests])
        for p in range(len(requests)):
            on_response((p, 0), rollout())
        return len(self.submitted)

    def collect(self, ticket: int) -> None:
        # all are asked before any is waited for
        assert len(self.submitted) == 2
        self.collected.append(ticket)


@pytest.mark.parametrize("is_main", [True, False])
def test_all_suites_are_asked_at_once_and_told_apart(is_main: bool):
    chat: Any = CountingChat()
    serving, scored = Serving(), []
    policy: Any = SimpleNamespace(response_logprobs=lambda pairs: scored.extend(pairs) or [[0.0]])
    parallel: Any = Rank(is_main, from_main=[[[1, 2], [3]]])
    suites = [
        suite(chat=chat, exact_problems=PROBLEMS[:1]),
        suite(chat=chat, name="old", problems=PROBLEMS[1:2]),
    ]
    unused: Any = serving
    evaluator = Evaluator(
        suites, unused, policy, parallel, name="run", conditions=conditions if is_main else None
    )
    measured = evaluator.evaluate(7)
    metrics = {key: value for one in measured for key, value in one.metrics.items()}
    assert serving.submitted == ([["eval p0", "eval p1"], ["eval_old p1"]] if is_main else [[], []])
    assert serving.collected == [1, 2] and [*map(tuple, scored)] == [([1, 2], [3])]
    assert [one.suite.split for one in measured] == (["eval", "eval_old"] if is_main else [])
    if is_main:
        assert metrics["test/exact_answer_prob"] == 1.0 and "test_old/exact_answer_prob" not in metrics
        assert metrics["test/env/all/correct"] == metrics["test/avg@1"] == 0.5
        assert metrics["test_old/avg@1"] == 0.0
        assert measured[0].evaluation.subject == {"name": "run after 7 steps"}
        assert [one.evaluation.step for one in measured] == [7, 7]
        assert measured[0].evaluation.ruler["problems"] != measured[1].evaluation.ruler["problems"]
    else:
        assert metrics == {} and chat.calls == 0


def test_an_answer_behind_a_prompt_that_began_a_thought_is_not_measured():
    chat: Any = CountingChat(opens=True)
    unused: Any = None
    rank: Any = Rank(True)
    evaluator = Evaluator([], unused, unused, rank, name="run", conditions=conditions)
    assert evaluator._exact(suite(chat=chat, problems=[], exact_problems=PROBLEMS)) == {}
    assert evaluator.evaluate(0) == []
