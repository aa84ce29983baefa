"""The client against a server that misbehaves."""

import contextlib
import json
import os
import resource
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import cast

import httpx
import pytest

from sdpo_megatron.algorithm.thoughts import Separated
from sdpo_megatron.config import ServerSettings
from sdpo_megatron.errors import RunFailed, ServerLost, ServerRefused, UserError
from sdpo_megatron.launch.server import ServedModel, ServerProcess, free_port
from sdpo_megatron.rollout.client import Client
from sdpo_megatron.rollout.sampler import Sampler
from sdpo_megatron.rollout.ticket import SampleRequest
from sdpo_megatron.rollout.weight_mark import WeightMark
from sdpo_megatron.rollout.wire import read_completion
from tests.small_server import MEMORY
from tests.stand_in_server import stand_in_python


@pytest.fixture(scope="module")
def server(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    directory = tmp_path_factory.mktemp("server")
    settings = ServerSettings(python=str(stand_in_python(directory / "python")), start_timeout_s=60.0)
    model = ServedModel(
        path=tiny_model(),
        dtype="float32",
        device="cpu",
        context_length=128,
        max_responses=4,
        memory=MEMORY,
        seed=0,
    )
    process = ServerProcess(settings, model, directory / "server.log")
    process.start()
    process.wait_healthy()
    yield process
    process.stop()


@pytest.fixture
def fault(server: ServerProcess) -> Iterator[Callable[[str, str], None]]:
    """Makes the server misbehave on a path until the test ends."""
    paths = set()

    def set_fault(path: str, kind: str) -> None:
        paths.add(path)
        body = json.dumps({"path": path, "kind": kind}).encode()
        urllib.request.urlopen(urllib.request.Request(f"{server.url}/_test/fault", body)).read()

    yield set_fault
    for path in paths:
        set_fault(path, "none")


def test_a_server_that_does_not_answer_hangs(server: ServerProcess, fault):
    fault("/generate", "hang")
    started = time.monotonic()
    with pytest.raises(ServerLost) as caught:
        Client(server.url, server.api_key, timeout_s=0.5).prompt_logprobs([1, 2, 3])
    assert time.monotonic() - started < 5
    assert str(caught.value) == f"the server at {server.url} did not answer /generate in time: it hangs"


class AnyWeights:
    def read(self, mark: str, url: str) -> int:
        return 0


@pytest.mark.parametrize("status", [400, 500])
def test_what_a_server_says_of_an_error_does_nothing_to_a_terminal(status: int):
    """Cleared screens, titles, colours, other lines: a server may be anybody's."""
    body = "\x1b]0;title\x07\x1b[2J\x9b31mred\r\nstopped: all is well\u202e"

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(status, text=body)

    client = Client("http://127.0.0.1:9")
    client._http = httpx.Client(base_url=client.url, transport=httpx.MockTransport(answer))
    with pytest.raises(ServerRefused if status == 400 else ServerLost) as caught:
        client.flush_cache()
    assert str(caught.value).isprintable()
    assert str(caught.value).endswith(
        f"with {status}: \\x1b]0;title\\x07\\x1b[2J\\x9b31mred stopped: all is well\\u202e"
    )


def test_the_sampler_notices_a_hang(server: ServerProcess, fault):
    fault("/generate", "hang")
    sampler = Sampler(
        [Client(server.url, server.api_key)],
        stop_token_ids=[],
        max_context_length=128,
        max_concurrent=4,
        idle_timeout_s=0.5,
        separate=lambda prompt, ids: Separated(thought="", answer="", closed=True),
        train_truncated=True,
        mark=cast(WeightMark, AnyWeights()),
    )
    request = SampleRequest(id="p", prompt_ids=[1, 2], n=1, temperature=1.0, max_tokens=4)
    ticket = sampler.submit([request, request])
    with pytest.raises(ServerLost) as caught:
        sampler.collect(ticket)
    assert caught.value.url == server.url
    assert str(caught.value) == (
        f"the server at {server.url} answered none of the 2 requests under way within rollout.idle_timeout_s=0.5 s: it "
        "hangs, or a single response takes longer; then raise that limit, or lower rollout.max_tokens"
    )
    fault("/generate", "none")
    assert [len(group) for group in sampler.collect(ticket)] == [1, 1]


def test_an_internal_error_is_a_lost_server(server: ServerProcess, fault):
    fault("/flush_cache", "fail")
    with pytest.raises(ServerLost, match="answered /flush_cache with 500: Internal Server Error"):
        Client(server.url, server.api_key).flush_cache()


def test_servers_without_update_sessions_need_none(server: ServerProcess, fault):
    fault("/begin_weight_update", "missing")
    fault("/end_weight_update", "missing")
    client = Client(server.url, server.api_key)
    client.begin_update()
    client.end_update()


@pytest.mark.parametrize("path", ["/flush_cache", "/pause_generation", "/update_weights_from_distributed"])
def test_any_other_missing_path_is_an_error(server: ServerProcess, fault, path):
    fault(path, "missing")
    client = Client(server.url, server.api_key)
    calls = {
        "/flush_cache": client.flush_cache,
        "/pause_generation": client.pause,
        "/update_weights_from_distributed": lambda: client.update_from_distributed(
            names=[], dtypes=[], shapes=[], group_name="g", version=None
        ),
    }
    with pytest.raises(ServerRefused, match=f"answered {path} with 404"):
        calls[path]()


def test_an_unreachable_server_is_lost():
    client = Client(f"http://127.0.0.1:{free_port('127.0.0.1')}")
    assert not client.healthy()
    with pytest.raises(ServerLost, match="cannot be reached for /model_info"):
        client.model_info()


@pytest.mark.parametrize(
    ("url", "looked_at"), [("https://a", True), ("HTTPS://a", True), ("http://a", False)]
)
def test_a_servers_certificate_is_looked_at_however_its_url_is_written(
    url: str, looked_at: bool, monkeypatch: pytest.MonkeyPatch
):
    asked: list[bool] = []
    monkeypatch.setattr(httpx, "AsyncHTTPTransport", lambda verify, **options: asked.append(verify))
    Client(url).session()
    assert asked == [looked_at]


def test_what_is_no_sglang_server_is_not_waited_for():
    class NothingHere(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

    with HTTPServer(("127.0.0.1", 0), NothingHere) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{other.server_port}"
        with pytest.raises(UserError) as caught:
            Client(url).healthy()
        other.shutdown()
    assert str(caught.value) == (
        f"What answers at {url} is no SGLang server: it has no /health; give the URL of one in server.urls."
    )


def test_servers_that_report_one_version_per_response_are_understood():
    meta = {
        "output_token_logprobs": [[-1.0, 5, None], [-2.0, 6, None]],
        "finish_reason": {"type": "stop", "matched": 6},
        "weight_version": "3",
    }
    (span,) = read_completion(json.dumps({"meta_info": meta}).encode()).weight_spans
    assert (span.start, span.end, span.mark) == (0, 2, "3")


def test_a_limit_of_open_files_is_no_fault_of_the_server(server: ServerProcess):
    """It would be killed and started again, and the words "open files" be nowhere."""
    client = Client(server.url, server.api_key)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 2, hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        for call in (client.model_info, client.healthy):
            with pytest.raises(RunFailed, match="too many files are open in this process"):
                call()
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert client.healthy()
