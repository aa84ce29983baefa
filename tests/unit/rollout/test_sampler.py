"""The sampler against a client that answers from a script."""

import asyncio
import threading
from array import array
from dataclasses import replace
from typing import Any, cast

import msgspec
import pytest

from sdpo_megatron.algorithm.thoughts import Separated
from sdpo_megatron.errors import ServerLost, UserError
from sdpo_megatron.records import WeightSpan
from sdpo_megatron.rollout import sampler as sampler_module
from sdpo_megatron.rollout.client import Client
from sdpo_megatron.rollout.sampler import Sampler, SamplingAborted
from sdpo_megatron.rollout.ticket import SampleRequest
from sdpo_megatron.rollout.weight_mark import WeightMark
from sdpo_megatron.rollout.wire import Completion, MarkedSpan


class Session:
    async def aclose(self) -> None:
        pass


class ScriptedClient:
    """Answers each request with `completion`, fails where told, and remembers what it was asked."""

    def __init__(self, completion: Completion | None = None):
        self.completion = completion or Completion(
            ids_T=array("i", [7, 8, 2]),
            logprobs_T=array("f", [-1.0, -2.0, -0.5]),
            finish_reason="stop",
            weight_spans=[MarkedSpan(start=0, end=3, mark="ab-4")],
        )
        self.url = "http://127.0.0.1:1"
        self.asked: list[dict[str, Any]] = []
        self.prefilled: list[list[int]] = []
        self.lost_prompts: list[list[int]] = []
        self.under_way = 0
        self.most_under_way = 0
        self.hold: asyncio.Event | None = None
        self.seconds, self.turns = 0.01, asyncio.Semaphore(1000)

    def session(self) -> Session:
        return Session()

    async def prefill(self, session: Session, prompt: msgspec.Raw) -> None:
        prompt_ids = msgspec.json.decode(prompt)
        await asyncio.sleep(self.seconds if self.hold is None else 1000)
        if prompt_ids in self.lost_prompts:
            raise ServerLost("gone")
        self.prefilled.append(prompt_ids)

    async def generate(self, session: Session, prompt: msgspec.Raw, **parameters: Any) -> Completion:
        prompt_ids = msgspec.json.decode(prompt)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            alone = prompt_ids not in self.prefilled
            async with self.turns:
                await asyncio.sleep(self.seconds if self.hold is None else 1000)
            if prompt_ids in self.lost_prompts:
                raise ServerLost("gone")
            self.asked.append({"prompt_ids": prompt_ids, "alone": alone} | parameters)
            return self.completion
        finally:
            self.under_way -= 1


def spoken(prompt_ids: list[int], ids: list[int]) -> Separated:
    return Separated(thought=str(prompt_ids[0]), answer=" ".join(map(str, ids)), closed=True)


def make_sampler(*clients: ScriptedClient, train_truncated: bool = True, **changes: Any) -> Sampler:
    arguments: dict[str, Any] = {
        "stop_token_ids": [2],
        "max_context_length": 10,
        "max_concurrent": 4,
        "idle_timeout_s": 5.0,
        "separate": spoken,
        "train_truncated": train_truncated,
        "mark": WeightMark("ab"),
    }
    return Sampler(cast(list[Client], list(clients)), **(arguments | changes))


def request(i: int, prompt: int = 3, n: int = 2, max_tokens: int = 4) -> SampleRequest:
    ids = [i] * prompt
    return SampleRequest(id=f"p{i}", prompt_ids=ids, n=n, temperature=0.5, top_p=0.9, max_tokens=max_tokens)


def test_who_waits_for_responses_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sampler_module, "WAITS_S", 0.05)
    said: list[int] = []
    client = ScriptedClient()
    client.seconds = 0.3
    sampler = make_sampler(client, while_waiting=lambda: said.append(1))
    assert len(sampler.collect(sampler.submit([request(1)]))[0]) == 2
    assert 2 <= len(said) <= 30


def test_rollouts_come_back_in_order_with_everything_the_server_said():
    client = ScriptedClient()
    sampler = make_sampler(client)
    ticket = sampler.submit([request(1), request(2, n=3)])
    first, second = sampler.collect(ticket)
    assert (len(first), len(second)) == (2, 3)
    assert [r.prompt_ids for r in (first[0], second[0])] == [[1, 1, 1], [2, 2, 2]]
    rollout = second[2]
    assert rollout.response_ids_T == array("i", [7, 8, 2])
    assert rollout.rollout_logprobs_T == array("f", [-1.0, -2.0, -0.5])
    assert rollout.loss_mask_T == array("B", [1, 1, 1])
    assert rollout.weight_spans == [WeightSpan(start=0, end=3, version=4)]
    assert rollout.finish_reason == "stop"
    assert (rollout.thought, rollout.text) == ("2", "7 8 2")
    asked = client.asked[0]
    assert (asked["temperature"], asked["top_p"], asked["stop_token_ids"]) == (0.5, 0.9, [2])


def test_prompt_plus_max_tokens_is_clamped_to_the_context_length():
    client = ScriptedClient()
    sampler = make_sampler(client)
    ticket = sampler.submit([request(1, prompt=8, max_tokens=4), request(2, prompt=3, max_tokens=4)])
    sampler.collect(ticket)
    assert {asked["prompt_ids"][0]: asked["max_tokens"] for asked in client.asked} == {1: 2, 2: 4}


def test_a_prompt_that_leaves_no_room_is_named():
    client = ScriptedClient()
    with pytest.raises(UserError) as caught:
        make_sampler(client).submit([request(1), request(2, prompt=10)])
    assert str(caught.value) == (
        "the prompt of p2 has 10 tokens, which leaves no room for a response in model.max_context_length=10: "
        "raise it, or leave the problem out"
    )
    assert client.asked == []


@pytest.mark.parametrize(
    ("finish", "train_truncated", "mask"),
    [("length", True, 1), ("length", False, 0), ("stop", False, 1), ("abort", False, 0)],
)
def test_truncated_responses_are_trained_only_where_asked(finish, train_truncated, mask):
    spans = [MarkedSpan(start=0, end=2, mark="ab-0")]
    completion = Completion(
        ids_T=array("i", [7, 8]),
        logprobs_T=array("f", [-1.0, -2.0]),
        finish_reason=finish,
        weight_spans=spans,
    )
    sampler = make_sampler(ScriptedClient(completion), train_truncated=train_truncated)
    ticket = sampler.submit([request(1, n=1)])
    ((rollout,),) = sampler.collect(ticket)
    assert rollout.loss_mask_T == array("B", [mask, mask])
    assert rollout.finish_reason == finish


@pytest.mark.parametrize(("finish", "mask"), [("length", 0), ("stop", 1)])
def test_a_response_that_ended_inside_its_thought(finish, mask):
    """Whether it was cut off, and counts for the loss, is still what the server said."""
    spans = [MarkedSpan(start=0, end=2, mark="ab-0")]
    completion = Completion(
        ids_T=array("i", [7, 8]),
        logprobs_T=array("f", [-1.0, -2.0]),
        finish_reason=finish,
        weight_spans=spans,
    )
    unfinished = Separated(thought="7 8", answer="", closed=False)
    client = ScriptedClient(completion)
    sampler = make_sampler(client, train_truncated=False, separate=lambda prompt, ids: unfinished)
    ticket = sampler.submit([request(1, n=1)])
    ((rollout,),) = sampler.collect(ticket)
    assert (rollout.finish_reason, rollout.thought, rollout.text) == ("thinking", "7 8", "")
    assert rollout.loss_mask_T == array("B", [mask, mask])


def test_responses_that_are_there_are_neither_asked_for_nor_told_of():
    sampler = make_sampler(ScriptedClient())
    first = sampler.submit([request(1), request(2, n=3)])
    there, more = sampler.collect(first), ScriptedClient()
    done = {(0, 0): there[0][0], (1, 1): there[1][1], (1, 2): there[1][2]}
    sampler, told = make_sampler(more), []
    ticket = sampler.submit([request(1), request(2, n=3)], lambda place, _: told.append(place), done)
    found = sampler.collect(ticket)
    assert sorted(told) == [(0, 1), (1, 0)]
    assert sorted(asked["prompt_ids"][0] for asked in more.asked) == [1, 2]
    assert found == there and found[1][2] is done[1, 2]
    # where nothing is missing nobody is asked at all
    everything = {(p, g): rollout for p, group in enumerate(there) for g, rollout in enumerate(group)}
    assert sampler.collect(sampler.submit([request(1), request(2, n=3)], None, everything)) == there
    assert len(more.asked) == 2


def test_a_digest_of_requests_has_all_that_decides_what_responses_may_be():
    def digest(*requests: SampleRequest, **settings: Any) -> str:
        return make_sampler(ScriptedClient(), **settings).digest(requests)

    plain = digest(request(1), request(2))
    assert plain == digest(request(1), request(2), max_concurrent=1, idle_timeout_s=9.0)
    changes: list[dict[str, Any]] = [
        *({"id": "x"}, {"prompt_ids": [1, 1, 2]}, {"n": 3}),
        *({"temperature": 0.6}, {"top_p": 1.0}, {"max_tokens": 5}),
    ]
    others = [digest(replace(request(1), **change), request(2)) for change in changes]
    settings: list[dict[str, Any]] = [
        *({"stop_token_ids": [2, 3]}, {"max_context_length": 11}, {"train_truncated": False}),
    ]
    others += [digest(request(1), request(2), **change) for change in settings]
    others += [digest(request(2), request(1)), digest(request(1))]
    assert len({plain, *others}) == 1 + len(changes) + len(settings) + 2


def test_groups_go_round_the_servers_within_the_limit():
    clients = [ScriptedClient(), ScriptedClient()]
    sampler = make_sampler(*clients, max_concurrent=3)
    ticket = sampler.submit([request(i) for i in range(10)])
    sampler.collect(ticket)
    assert sorted(asked["prompt_ids"][0] for asked in clients[0].asked) == [0, 0, 2, 2, 4, 4, 6, 6, 8, 8]
    assert sorted(asked["prompt_ids"][0] for asked in clients[1].asked) == [1, 1, 3, 3, 5, 5, 7, 7, 9, 9]
    assert sum(client.most_under_way for client in clients) <= 4  # 3 at once, in two separate maxima
    assert max(client.most_under_way for client in clients) <= 3


def test_after_a_lost_server_only_what_is_missing_is_asked_again():
    client = ScriptedClient()
    client.lost_prompts = [[3, 3, 3]]
    sampler = make_sampler(client, max_concurrent=1)
    ticket = sampler.submit([request(i, n=1) for i in (1, 2, 3, 4)])
    with pytest.raises(ServerLost):
        sampler.collect(ticket)
    client.lost_prompts = []
    rollouts = sampler.collect(ticket)
    assert [group[0].prompt_ids[0] for group in rollouts] == [1, 2, 3, 4]
    assert [asked["prompt_ids"][0] for asked in client.asked] == [1, 2, 3, 4]
    assert sampler.answered == 4
    ticket = sampler.submit([request(5)])
    assert len(sampler.collect(ticket)) == 1


def test_a_server_that_is_lost_costs_what_it_had_under_way_alone():
    """The other one answers in its place; what either has answered before is not asked again."""
    clients = [ScriptedClient(), ScriptedClient()]
    clients[1].url = "http://127.0.0.1:2"
    clients[1].lost_prompts = [[3, 3, 3]]
    sampler = make_sampler(*clients, max_concurrent=2)
    ticket = sampler.submit([request(i) for i in range(6)])
    rollouts = sampler.collect(ticket)
    assert [[r.prompt_ids[0] for r in group] for group in rollouts] == [[i, i] for i in range(6)]
    assert [str(loss) for loss in ticket.losses] == ["gone"]
    answered = [asked["prompt_ids"][0] for client in clients for asked in client.asked]
    assert sorted(answered) == sorted([*range(6), *range(6)])
    ticket = sampler.submit([request(1)])
    sampler.collect(ticket)
    assert ticket.losses == []


def test_a_server_with_much_to_do_is_not_lost():
    """It answers one after another: each takes a fifth of the limit, and what waits behind others four times as long as
    it."""
    client = ScriptedClient()
    client.seconds, client.turns = 0.1, asyncio.Semaphore(1)
    sampler = make_sampler(client, max_concurrent=20, idle_timeout_s=0.5)
    ticket = sampler.submit([request(i, n=1) for i in range(20)])
    assert len(sampler.collect(ticket)) == 20 and ticket.losses == []
    assert client.most_under_way == 20


def test_a_server_that_answers_nothing_is_lost_with_all_that_it_had():
    client = ScriptedClient()
    client.hold = asyncio.Event()
    sampler = make_sampler(client, idle_timeout_s=0.3)
    ticket = sampler.submit([request(1), request(2)])
    with pytest.raises(
        ServerLost, match=r"none of the 4 requests under way within rollout.idle_timeout_s=0.3 s"
    ):
        sampler.collect(ticket)
    assert client.under_way == 0
    client.hold = None
    assert len(sampler.collect(ticket)) == 2


def test_abort_interrupts_collect_and_keeps_the_requests():
    client = ScriptedClient()
    client.hold = asyncio.Event()
    sampler = make_sampler(client)
    ticket = sampler.submit([request(1), request(2)])
    threading.Timer(0.2, sampler.abort).start()
    with pytest.raises(SamplingAborted):
        sampler.collect(ticket)
    sampler.abort()  # harmless afterwards
    client.hold = None
    assert len(sampler.collect(ticket)) == 2


def test_weights_of_another_run_end_the_sampling():
    """Also where only a part of a response is theirs."""
    spans = [MarkedSpan(start=0, end=1, mark="ab-4"), MarkedSpan(start=1, end=2, mark="cd-4")]
    completion = Completion(
        ids_T=array("i", [7, 8]),
        logprobs_T=array("f", [-1.0, -2.0]),
        finish_reason="length",
        weight_spans=spans,
    )
    sampler = make_sampler(ScriptedClient(completion))
    ticket = sampler.submit([request(1)])
    with pytest.raises(
        UserError, match=r"has weights that another run pushed \(cd-4; this run's begin with ab\)"
    ):
        sampler.collect(ticket)


def test_a_server_without_the_runs_weights_is_lost_and_asked_again():
    client = ScriptedClient(
        Completion(
            ids_T=array("i", [7]),
            logprobs_T=array("f", [-1.0]),
            finish_reason="length",
            weight_spans=[MarkedSpan(start=0, end=1, mark="default")],
        )
    )
    sampler = make_sampler(client)
    ticket = sampler.submit([request(1)])
    with pytest.raises(ServerLost, match="was started anew, without the run's weights"):
        sampler.collect(ticket)
    client.completion = ScriptedClient().completion
    ((rollout, _),) = sampler.collect(ticket)
    assert rollout.weight_spans == [WeightSpan(start=0, end=3, version=4)]


def test_a_prompt_is_computed_once_before_its_siblings_are_asked_for():
    client = ScriptedClient()
    sampler = make_sampler(client)
    ticket = sampler.submit([request(1, n=3), request(2, n=1)])
    sampler.collect(ticket)
    assert client.prefilled == [[1, 1, 1]]
    assert {asked["prompt_ids"][0]: asked["alone"] for asked in client.asked} == {1: False, 2: True}
