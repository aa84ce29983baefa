"""Problems are tokenised on rank 0, and what all ranks need of that is shared; what is recorded, and when."""

import dataclasses
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sdpo_megatron.algorithm.reprompt import RepromptSettings
from sdpo_megatron.config import RolloutSettings
from sdpo_megatron.envs.jsonl import JsonlProblems
from sdpo_megatron.records import Grade, Group, Problem, Rollout, Sample
from sdpo_megatron.run import Run
from sdpo_megatron.run_dir.records_file import StepRecord
from tests.one_rank import Rank

PROBLEMS = [
    Problem(id=f"p{i}", messages=[{"role": "user", "content": "?"}], answer="a", canonical=True)
    for i in range(4)
]


class CountingChat:
    calls = 0

    def prompt_ids(self, messages, tools):
        self.calls += 1
        return [1, 2]

    def known_ids(self, ids):
        return [*ids, 3]


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


@pytest.mark.parametrize("asked", [{"the policy": "this one"}, {}])
def test_responses_of_before_an_interruption_are_graded_at_once_and_only_new_ones_kept(asked: dict[str, str]):
    """Nothing is taken, kept or removed where a push was given up."""
    told: list[Any] = []
    kept = {(0, 1): "old 0 1", (1, 0): "old 1 0"}

    def begin(step: int, asked: dict[str, str], prompts_P: list[list[int]]) -> dict[Any, Any]:
        told.append(("begin", step, asked, prompts_P))
        return kept

    log = SimpleNamespace(
        message=lambda line: told.append(line), add=lambda metrics: told.append(("add", metrics))
    )
    serving = SimpleNamespace(
        asked=lambda requests: asked,
        submit=lambda *arguments: told.append(("submit", *arguments)) or "ticket",
    )
    run: Any = SimpleNamespace(
        requests=lambda step: [SimpleNamespace(prompt_ids=[p], n=2) for p in range(2)],
        inflight=SimpleNamespace(begin=begin, keep=lambda *response: told.append(("keep", *response))),
        serving=serving,
        log=log,
    )
    grading: Any = SimpleNamespace(begin=lambda *response: told.append(("grade", *response)))
    assert Run.submit(run, 7, grading) == "ticket"
    _, requests, on_response, *done = told.pop()
    assert [request.prompt_ids for request in requests] == [[0], [1]]
    if asked:
        assert told == [
            ("begin", 7, asked, [[0], [1]]),
            "2 of 4 responses of step 7 were sampled before the interruption and are used again.",
            ("add", {"rollout/reused_count": 2}),
            ("grade", (0, 1), "old 0 1"),
            ("grade", (1, 0), "old 1 0"),
        ]
        assert done == [kept]
    else:
        assert told == done == []
    told.clear()
    on_response((0, 0), "new")
    assert told == [("keep", (0, 0), "new")] * bool(asked) + [("grade", (0, 0), "new")]


ANSWER = Rollout(
    prompt_ids=[1],
    response_ids_T=[2],
    rollout_logprobs_T=[0.0],
    loss_mask_T=[1],
    weight_spans=[],
    finish_reason="stop",
    text="a",
)


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
        step_samples=["sample"] * 4,
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

    def samples(seed: int, step: int) -> list[Sample]:
        run: Any = SimpleNamespace(
            reprompt=RepromptSettings(solution="random"),
            env=JsonlProblems.__new__(JsonlProblems),
            chat=CountingChat(),
            max_context_length=100,
            seed=seed,
        )
        return Run._samples_of(run, step, 0, group)

    def shown(seed: int, step: int) -> list[int | None]:
        return [sample.demonstration_id for sample in samples(seed, step)]

    # what is shown may spell what the model does not know
    assert {tuple(sample.teacher_prompt_ids or ()) for sample in samples(1, 3)} == {(1, 2, 3)}
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
        inflight=SimpleNamespace(
            settle=lambda: calls.append("settle inflight"),
            saved=lambda step: calls.append(f"inflight saved {step}"),
        ),
        _compare_with_grace=lambda seconds: None,
    )
    Run.save(run)
    # what is kept of a step goes once it is saved, and not before
    assert calls == ["settle inflight", "settle", "save 3", "inflight saved 3"] and run.saved == 3
    calls.clear()
    Run.save(run)
    # a step that was interrupted has its responses on the disk, also where there is nothing else to save
    assert calls == ["settle inflight"]
