"""Servers that release their memory: what is asked of them in which order, and of which not."""

from typing import Any

import pytest

from sdpo_megatron.errors import ServerLost, ServerRefused, UserError
from sdpo_megatron.rollout.weight_mark import WeightMark
from sdpo_megatron.serving import memory_release as module
from sdpo_megatron.serving.memory_release import MemoryRelease

CALLS = ("pause", "flush_cache", "release_memory", "resume_memory")


class FakeClient:
    """Notes its calls; `busy` flushes are refused."""

    def __init__(self, busy: int = 0):
        self.url = "http://a"
        self.busy = busy
        self.version = "ab-3"
        self.calls: list[str] = []
        self.lost_in = ""

    def __getattr__(self, name: str) -> Any:
        if name not in CALLS:
            raise AttributeError(name)

        def call(*arguments: Any) -> None:
            self.calls.append(" ".join([name, *(what for argument in arguments for what in argument)]))
            if name == self.lost_in:
                raise ServerLost("gone", self.url)
            if name == "flush_cache" and self.busy:
                self.busy -= 1
                raise ServerRefused("requests are running")

        return call

    def model_info(self) -> dict[str, str]:
        if self.lost_in == "model_info":
            raise ServerLost("gone", self.url)
        return {"weight_version": self.version}


def resting(client: FakeClient, **options: Any) -> MemoryRelease:
    """Which has released everything by now."""
    rest = MemoryRelease(WeightMark("ab"), **options)
    rest.begin(client)  # type: ignore[arg-type]
    return rest


def wake(rest: MemoryRelease, client: Any) -> list[str]:
    """What it is asked then."""
    client.calls.clear()
    rest.take_back_weights(client)
    rest.take_back_cache(client)
    return client.calls


def test_memory_is_released_once_nothing_runs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "POLL_S", 0.0)
    client = FakeClient(busy=2)
    rest = resting(client)
    assert client.calls == ["pause", *["flush_cache"] * 3, "release_memory kv_cache weights"]
    assert wake(rest, client) == ["resume_memory weights", "resume_memory kv_cache"]
    # what was taken back is not taken back again: that would end it
    assert wake(rest, client) == []


def test_a_server_that_has_released_nothing_is_asked_for_nothing():
    client = FakeClient()
    rest = MemoryRelease(WeightMark("ab"))
    assert wake(rest, client) == []


def test_a_server_that_stays_busy_is_not_told_to_release(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "POLL_S", 0.0)
    client = FakeClient(busy=10**9)
    with pytest.raises(
        ServerLost, match=r"http://a was not idle 0.05 s after it was paused.*requests are running"
    ):
        resting(client, idle_s=0.05)
    assert not any(call.startswith("release_memory") for call in client.calls)


@pytest.mark.parametrize("version", ["0", "default"])
def test_a_server_that_was_started_anew_has_its_memory(version: str):
    client = FakeClient()
    rest = resting(client)
    client.version = version
    assert wake(rest, client) == []
    # also once it has the run's weights
    client.version = "ab-4"
    assert wake(rest, client) == []


def test_a_push_that_failed_in_the_middle_takes_back_only_what_is_missing():
    client: Any = FakeClient()
    rest = resting(client)
    rest.take_back_weights(client)
    client.version = "ab-4"
    assert wake(rest, client) == ["resume_memory kv_cache"]


def test_a_call_that_was_lost_is_made_again_where_the_server_is_the_same():
    client: Any = FakeClient()
    rest = resting(client)
    client.lost_in = "resume_memory"
    with pytest.raises(ServerLost):
        rest.take_back_weights(client)
    client.lost_in = ""
    assert wake(rest, client) == ["resume_memory weights", "resume_memory kv_cache"]


def test_a_server_that_cannot_be_asked_is_lost_and_one_of_another_run_is_refused():
    client: Any = FakeClient()
    rest = resting(client)
    client.version = "cd-1"
    with pytest.raises(UserError, match="another run pushed"):
        rest.take_back_weights(client)
    client.lost_in = "model_info"
    with pytest.raises(ServerLost, match="gone"):
        rest.take_back_weights(client)
    client.lost_in, client.version = "", "ab-3"
    assert wake(rest, client) == ["resume_memory weights", "resume_memory kv_cache"]
