"""Suites of problems that a stand-in for a tokenizer reads."""

from concurrent.futures import Future
from typing import Any

from sdpo_megatron.envs.jsonl import JsonlProblems
from sdpo_megatron.evaluation.suite import Conditions, Sampling, Suite
from sdpo_megatron.records import Grade, Group, Problem, Rollout
from tests.graders import AtOnce

PROBLEMS = [
    Problem(id=f"p{i}", messages=[{"role": "user", "content": f"{i}?"}], answer="a", canonical=True)
    for i in range(4)
]
SAMPLING = Sampling(samples=1, temperature=0.6, top_p=0.95, max_tokens=5, max_context_length=64)


class CountingChat:
    template = "{{ messages }}"

    def __init__(self, opens: bool = False, arguments: dict[str, Any] | None = None) -> None:
        self.calls, self.opens, self.template_arguments = 0, opens, arguments or {}

    def prompt_ids(self, messages: Any, tools: Any) -> list[int]:
        self.calls += 1
        return [1, 2]

    def prompt_text(self, messages: Any, tools: Any) -> str:
        return "".join(message["content"] for message in messages)

    def answer_ids(self, text: str) -> list[int]:
        self.calls += 1
        return [3]

    def opens_thought(self, prompt_ids: Any) -> bool:
        return self.opens


class Judge(JsonlProblems):
    def __init__(self) -> None:
        pass


def grade(problem: Problem, rollout: Rollout) -> Grade:
    return Grade(reward=float(problem.id == "p0"))


def suite(**changed: Any) -> Suite:
    settings: dict[str, Any] = {
        "name": "test",
        "env_name": "jsonl",
        "env": Judge(),
        "grader": AtOnce(grade),
        "problems": PROBLEMS[:2],
        "sampling": SAMPLING,
        "chat": CountingChat(),
    }
    return Suite(**(settings | changed))


def conditions(**changed: Any) -> Conditions:
    base: Future[str] = Future()
    base.set_result(changed.pop("base_model", "b0"))
    return Conditions(**({"base_model": base, "server": "SGLang 1", "success_threshold": 0.5} | changed))


def rollout(text: str = "a", tokens: int = 1, thought: str = "") -> Rollout:
    return Rollout(
        prompt_ids=[1],
        response_ids_T=[2] * tokens,
        rollout_logprobs_T=[0.0] * tokens,
        loss_mask_T=[1] * tokens,
        weight_spans=[],
        finish_reason="stop",
        text=text,
        thought=thought,
    )


def group(problem: Problem, rewards: list[float], answers: list[str | None] | None = None) -> Group:
    given = answers or [None] * len(rewards)
    return Group(
        problem=problem,
        rollouts_G=[rollout() for _ in rewards],
        grades_G=[Grade(reward=r, answer=a) for r, a in zip(rewards, given, strict=True)],
    )
