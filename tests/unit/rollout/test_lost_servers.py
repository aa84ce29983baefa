"""Servers that are slow, or killed while they sample: processes of their own, over HTTP, behind the real Serving."""

import contextlib
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from sdpo_megatron.algorithm.thoughts import Separated
from sdpo_megatron.launch.server import free_port
from sdpo_megatron.rollout.client import Client
from sdpo_megatron.rollout.sampler import Sampler
from sdpo_megatron.rollout.ticket import SampleRequest
from sdpo_megatron.rollout.weight_mark import WeightMark
from sdpo_megatron.serving.recovery import Serving
from tests.unit.serving.test_recovery import FakeCanary, FakeServers, FakeStop, FakeWeights, OneRank

PROGRAM = Path(__file__).parents[2] / "counting_server.py"
GROUPS, GROUP_SIZE = 6, 4


class CountingServer:
    """One that was started, and what it has written down."""

    def __init__(self, log: Path, seconds: float):
        self.log, self.seconds, self.port = log, seconds, free_port("127.0.0.1")
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        self.log.touch()
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAM), str(self.port), str(self.log), str(self.seconds)]
        )
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.02)
        raise AssertionError("the counting server does not come up")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def counted(self, what: str) -> Counter[int]:
        """How often each prompt was `asked`, or `answered`."""
        lines = [line.split() for line in self.log.read_text().splitlines()]
        return Counter(int(prompt) for kind, prompt in lines if kind == what)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[float], CountingServer]]:
    servers: list[CountingServer] = []

    def begin(seconds: float) -> CountingServer:
        servers.append(CountingServer(tmp_path / f"server_{len(servers)}.log", seconds))
        return servers[-1]

    yield begin
    for server in servers:
        server.kill()


def serving_of(
    servers: list[CountingServer], idle_timeout_s: float, max_concurrent: int
) -> tuple[Any, list[str]]:
    """A Serving that restarts what was killed, and its messages."""
    sampler = Sampler(
        [Client(server.url) for server in servers],
        stop_token_ids=[],
        max_context_length=64,
        max_concurrent=max_concurrent,
        idle_timeout_s=idle_timeout_s,
        separate=lambda prompt, ids: Separated(thought="", answer="", closed=True),
        train_truncated=True,
        mark=WeightMark("ab"),
    )
    messages: list[str] = []
    fakes = [FakeServers(), FakeWeights(), FakeCanary(), OneRank(), FakeStop()]
    parts = Serving(sampler, *cast(list[Any], fakes), max_restarts=2, message=messages.append)
    return parts, messages


REQUESTS = [
    SampleRequest(id=f"p{p}", prompt_ids=[p, 9], n=GROUP_SIZE, temperature=1.0, max_tokens=4)
    for p in range(GROUPS)
]


def assert_each_is_there_once(serving: Serving, arrived: list[tuple[int, int]], rollouts_PG: Any) -> None:
    assert [[rollout.response_ids_T[0] for rollout in group] for group in rollouts_PG] == [
        [p] * GROUP_SIZE for p in range(GROUPS)
    ]
    assert sorted(arrived) == [(p, g) for p in range(GROUPS) for g in range(GROUP_SIZE)]
    assert serving.sampler is not None and serving.sampler.answered == GROUPS * GROUP_SIZE


def test_a_server_slower_than_any_limit_is_not_restarted(start):
    """Each response is within the idle limit, and all that are under way together take longer than it. Where the limit
    were short a busy machine would exceed it between two answers."""
    server = start(0.25)
    parts, messages = serving_of([server], idle_timeout_s=4.0, max_concurrent=GROUPS * GROUP_SIZE)
    arrived: list[tuple[int, int]] = []
    began = time.monotonic()
    rollouts_PG = parts.collect(parts.submit(REQUESTS, lambda place, rollout: arrived.append(place)))
    assert time.monotonic() - began > 1.4 * 4.0
    assert_each_is_there_once(parts, arrived, rollouts_PG)
    assert messages == [] and parts.servers.restart_lost.calls == 0
    assert server.counted("asked") == {p: GROUP_SIZE for p in range(GROUPS)}


def kill_in_mid_rollout(server: CountingServer) -> Counter[int]:
    """Returns what it had under way when it was killed."""
    deadline = time.monotonic() + 20
    while server.counted("answered").total() < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    server.kill()
    return server.counted("asked") - server.counted("answered")


def test_a_server_killed_in_mid_rollout_costs_only_what_it_had_under_way(start):
    """The other one answers in its place, and is asked for nothing that had been answered."""
    servers = [start(0.05), start(0.05)]
    parts, messages = serving_of(servers, idle_timeout_s=20.0, max_concurrent=8)
    arrived: list[tuple[int, int]] = []
    ticket = parts.submit(REQUESTS, lambda place, rollout: arrived.append(place))
    under_way = kill_in_mid_rollout(servers[1])
    assert 0 < under_way.total() <= 8
    assert_each_is_there_once(parts, arrived, parts.collect(ticket))
    (message,) = messages
    assert message.startswith(f"the server at {servers[1].url} cannot be reached for /generate")
    assert parts.servers.restart_lost.calls == 0
    asked = servers[0].counted("asked") + servers[1].counted("asked")
    again = asked - Counter({p: GROUP_SIZE for p in range(GROUPS)})
    # an answer may have been on its way when the server was killed
    assert under_way.total() <= again.total() <= under_way.total() + 1


def test_the_only_server_killed_in_mid_rollout_is_restarted_and_asked_for_the_rest(start):
    server = start(0.05)
    parts, messages = serving_of([server], idle_timeout_s=20.0, max_concurrent=8)
    parts.servers.restart_lost = lambda url: server.start()
    arrived: list[tuple[int, int]] = []
    ticket = parts.submit(REQUESTS, lambda place, rollout: arrived.append(place))
    under_way = kill_in_mid_rollout(server)
    assert_each_is_there_once(parts, arrived, parts.collect(ticket))
    (message,) = messages
    assert message.endswith("; restart (1 of 2)")
    again = server.counted("asked") - Counter({p: GROUP_SIZE for p in range(GROUPS)})
    assert under_way.total() <= again.total() <= under_way.total() + 1
