"""Problems are tokenised on rank 0, and what all ranks need of that is shared; what is recorded, and when."""

import dataclasses
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sdpo_megatron.algorithm.reprompt import RepromptSettings
from sdpo_megatron.config import EvalSettings, RolloutSettings
from sdpo_megatron.envs.jsonl import JsonlProblems
from sdpo_megatron.evaluate import Evaluator
from sdpo_megatron.records import Grade, Group, Problem, Rollout
from sdpo_megatron.run import Run
from sdpo_megatron.run_dir.records_file import StepRecord
from sdpo_megatron.trainer.batch import OfStep
from tests.graders import AtOnce

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

    def prompt_ids(self, messages, tools):
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


ANSWER = Rollout(
    prompt_ids=[1],
    response_ids_T=[2],
    rollout_logprobs_T=[0.0],
    loss_mask_T=[1],
    weight_spans=[],
    finish_reason="stop",
    text="a",
)


@pytest.mark.parametrize("is_main", [True, False])
def test_an_evaluations_requests_and_answers(is_main: bool):
    chat: Any = CountingChat()
    submitted, scored = [], []

    def submit(requests: list[Any], on_response: Any) -> str:
        submitted.extend(requests)
        for p in range(len(requests)):
            on_response((p, 0), ANSWER)
        return "a ticket"

    serving: Any = SimpleNamespace(submit=submit, collect=lambda ticket: ticket == "a ticket" or 1 / 0)
    policy: Any = SimpleNamespace(response_logprobs=lambda pairs: scored.extend(pairs) or [[0.0]])
    parallel: Any = Rank(is_main, from_main=[[[1, 2], [3]]])
    settings = EvalSettings(problems=2, exact_problems=1)
    grader = AtOnce(lambda problem, rollout: Grade(reward=float(problem.id == "p0")))
    evaluator = Evaluator(
        PROBLEMS,
        grader,
        chat,
        serving,
        policy,
        parallel,
        settings=settings,
        max_tokens=5,
        success_threshold=0.5,
    )
    metrics, groups_P = evaluator.evaluate()
    assert metrics["test/exact_answer_prob"] == 1.0
    assert [group.grades_G[0].reward for group in groups_P] == ([1.0, 0.0] if is_main else [])
    assert metrics.get("test/env/all/correct") == (0.5 if is_main else None)
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


@pytest.mark.parametrize("optimizer_steps", [1, 2])
def test_a_record_is_handed_over_as_references_to_the_recorded_groups_tokens(optimizer_steps: int):
    records: list[StepRecord] = []
    asked: list[Any] = []

    def gathered(names: list[str], parallel: Any, samples: int) -> dict[str, np.ndarray]:
        asked.append((set(names), samples))
        return dict.fromkeys(names, numbers) if parallel.is_main else {}

    numbers = np.arange(5.0)
    batch: Any = SimpleNamespace(
        gathered=gathered,
        old_logprobs_B=None if optimizer_steps == 1 else torch.arange(10.0),
        of_step=OfStep(["sample"] * 4, ["part"]),  # type: ignore[arg-type]
    )
    run: Any = SimpleNamespace(
        parallel=Rank(True),
        teacher=None if optimizer_steps == 1 else "teacher",
        recorded_groups=1,
        rollout=RolloutSettings(group_size=2),
        chat=SimpleNamespace(decode_all=str),
        log=SimpleNamespace(record=lambda split, record: records.append(record)),
    )
    groups_P: Any = ["group", "group"]
    Run.record(run, groups_P, batch)
    (record,) = records
    names = {"computed", "student_logprobs", "advantages", "divergence"}
    if optimizer_steps == 2:
        names |= {"old_logprobs", "teacher_logprobs"}
    assert record.recorded == 2 and record.columns.keys() == names
    assert all(column is numbers for column in record.columns.values())
    run.parallel.is_main = False
    Run.record(run, [], batch)
    # the other ranks send what they have of the recorded groups, and nothing else
    assert len(records) == 1 and asked == [asked[0]] * 2 and asked[0][1] == 2


def test_a_random_demonstration_is_drawn_by_seed_and_step_and_again_in_a_resumed_run():
    group = Group(
        problem=PROBLEMS[0],
        rollouts_G=[dataclasses.replace(ANSWER, text=str(g)) for g in range(8)],
        grades_G=[Grade(reward=1.0)] * 8,
    )

    def shown(seed: int, step: int) -> list[int | None]:
        run: Any = SimpleNamespace(
            reprompt=RepromptSettings(solution="random"),
            env=JsonlProblems.__new__(JsonlProblems),
            chat=CountingChat(),
            max_context_length=100,
            seed=seed,
        )
        return [sample.demonstration_id for sample in Run._samples_of(run, step, 0, group)]

    assert shown(1, 3) == shown(1, 3) and None not in shown(1, 3)
    assert shown(1, 3) != shown(1, 4) and shown(1, 3) != shown(2, 3)


def test_a_checkpoint_is_saved_once_the_records_of_its_steps_are_on_the_disk():
    calls: list[str] = []
    log = SimpleNamespace(timed=lambda phase: nullcontext(), settle=lambda: calls.append("settle"))
    run: Any = SimpleNamespace(
        completed=3,
        saved=2,
        log=log,
        save_state=lambda step: calls.append(f"save {step}"),
        _compare_with_grace=lambda seconds: None,
    )
    Run.save(run)
    assert calls == ["settle", "save 3"] and run.saved == 3
