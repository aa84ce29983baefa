"""Several tickets under way together, and grades that are made meanwhile."""

import asyncio
import threading
import time
from concurrent.futures import Future
from typing import Any

import pytest

from sdpo_megatron.envs.grading.step import Grading
from sdpo_megatron.errors import ServerLost
from sdpo_megatron.records import Grade, Group, Problem, Rollout
from sdpo_megatron.rollout.sampler import SamplingAborted
from tests.graders import InThread
from tests.unit.rollout.test_sampler import ScriptedClient, make_sampler, request

PROBLEMS = [Problem(id=f"p{p}", messages=[]) for p in range(4)]


def prompts(rollouts_PG) -> list[list[int]]:
    return [[rollout.prompt_ids[0] for rollout in rollouts_G] for rollouts_G in rollouts_PG]


@pytest.mark.parametrize("last_first", [False, True])
def test_tickets_are_collected_in_any_order_within_one_limit(last_first: bool):
    client = ScriptedClient()
    sampler = make_sampler(client, max_concurrent=3)
    asked = [[request(1), request(2)], [request(3, n=3)], [], [request(4, n=1)]]
    tickets = [sampler.submit(requests) for requests in asked]
    answers = [[[1, 1], [2, 2]], [[3, 3, 3]], [], [[4]]]
    order = [3, 2, 1, 0] if last_first else [0, 1, 2, 3]
    assert [prompts(sampler.collect(tickets[t])) for t in order] == [answers[t] for t in order]
    assert client.most_under_way == 3
    assert sampler.answered == 8 and len(client.asked) == 8
    with pytest.raises(RuntimeError, match="has been collected"):
        sampler.collect(tickets[0])


def test_a_lost_server_stops_all_tickets_and_all_go_on():
    """Who is collected first tells of it; the other is sampled again meanwhile, without being lost once more."""
    client = ScriptedClient()
    client.lost_prompts = [[2, 2, 2]]
    sampler = make_sampler(client, max_concurrent=1)
    first, second = sampler.submit([request(1, n=1), request(2, n=1)]), sampler.submit([request(3, n=1)])
    with pytest.raises(ServerLost):
        sampler.collect(first)
    time.sleep(0.1)
    client.lost_prompts = []
    assert prompts(sampler.collect(first)) == [[1], [2]]
    assert prompts(sampler.collect(second)) == [[3]]
    assert sorted(asked["prompt_ids"][0] for asked in client.asked) == [1, 2, 3]


def test_abort_stops_all_tickets():
    client = ScriptedClient()
    client.hold = asyncio.Event()
    sampler = make_sampler(client)
    tickets = [sampler.submit([request(1)]), sampler.submit([request(2)])]
    # at once: it must not be missed because the sampling has not begun
    sampler.abort()
    for ticket in tickets:
        with pytest.raises(SamplingAborted):
            sampler.collect(ticket)
    assert client.under_way == 0
    client.hold = None
    assert [prompts(sampler.collect(ticket)) for ticket in tickets] == [[[1, 1]], [[2, 2]]]


class SlowEnv:
    """Says in which order and where it graded; wrong where the first token of the prompt is."""

    def __init__(self, seconds: float = 0.0):
        self.seconds, self.graded = seconds, []
        self.threads, self.at_once = set(), 0

    def grade(self, problem: Problem, rollout: Rollout) -> Grade:
        self.at_once += 1
        assert self.at_once == 1
        time.sleep(self.seconds)
        self.threads.add(threading.get_ident())
        self.graded.append(problem.id)
        self.at_once -= 1
        if problem.id == "p3":
            raise ZeroDivisionError("of the environment")
        return Grade(reward=float(problem.id[1:]), feedback=rollout.text)


def grading_of(env: SlowEnv, problems: int, group_size: int) -> Grading[tuple[int, Group, int]]:
    grader = InThread(env.grade)

    def prepare(p: int, group: Group, result: Future[tuple[int, Group, int]]) -> None:
        grader.thread.run(lambda: (p, group, threading.get_ident()), result)

    return Grading(PROBLEMS[:problems], grader, group_size, prepare)


def test_responses_are_graded_while_others_are_sampled():
    """16 grades of 0.05 s beside a sampling that lasts longer: what is left takes one."""
    env, client = SlowEnv(0.05), ScriptedClient()
    client.seconds = 0.08
    grading, sampler = grading_of(env, 2, 8), make_sampler(client, max_concurrent=1)
    ticket = sampler.submit([request(p, n=8) for p in range(2)], grading.begin)
    sampler.collect(ticket)
    began = time.monotonic()
    groups_P = grading.join()
    assert time.monotonic() - began < 4 * 0.05
    assert [[grade.reward for grade in group.grades_G] for group in groups_P] == [[0.0] * 8, [1.0] * 8]
    # what is made of a group is made in the environment's thread, from all of its grades
    assert grading.prepared() == [(p, group, *env.threads) for p, group in enumerate(groups_P)]
    assert len(env.threads) == 1 and threading.get_ident() not in env.threads


class BackwardsClient(ScriptedClient):
    """Answers later prompts first."""

    async def generate(self, session: Any, prompt: Any, **parameters: Any) -> Any:
        await asyncio.sleep(0.1 * (3 - int(bytes(prompt)[1:2])))
        return await super().generate(session, prompt, **parameters)


def test_grades_are_joined_by_place_in_whatever_order_responses_come():
    env = SlowEnv()
    grading, sampler = grading_of(env, 3, 1), make_sampler(BackwardsClient(), max_concurrent=9)
    ticket = sampler.submit([request(p, n=1) for p in range(3)], grading.begin)
    sampler.collect(ticket)
    groups_P = grading.join()
    assert [p for p, _, _ in grading.prepared()] == [0, 1, 2]
    assert env.graded == ["p2", "p1", "p0"]
    assert [group.grades_G[0].reward for group in groups_P] == [0.0, 1.0, 2.0]


def test_what_an_environment_raises_is_raised_where_grades_are_joined():
    env = SlowEnv()
    grading, sampler = grading_of(env, 4, 1), make_sampler(ScriptedClient(), max_concurrent=1)
    ticket = sampler.submit([request(p, n=1) for p in (0, 1, 2, 3)], grading.begin)
    sampler.collect(ticket)
    for joined in (grading.join, grading.prepared):
        with pytest.raises(ZeroDivisionError, match="of the environment"):
            joined()


def test_a_bug_in_what_is_given_the_responses_is_raised_at_collect():
    def broken(place: Any, rollout: Any) -> None:
        raise KeyError("ours")

    sampler = make_sampler(ScriptedClient())
    ticket = sampler.submit([request(1)], broken)
    with pytest.raises(KeyError, match="ours"):
        sampler.collect(ticket)
