"""Answers become arrays without loss; what is no answer becomes one line."""

import asyncio
import gc
import json
import threading
import time
from array import array
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from sdpo_megatron.errors import ServerLost, ServerRefused
from sdpo_megatron.rollout.client import Client
from sdpo_megatron.rollout.wire import Completion, encoded_prompt, read_completion

META = {
    "output_token_logprobs": [[-1.5, 5, None], [-2, 6, "text"]],
    "finish_reason": {"type": "stop", "matched": 6},
    "weight_version": "ab-3",
    "weight_versions": [
        {"version": "ab-2", "start": 0, "end": 1},
        {"version": "ab-3", "start": 1, "end": 2},
    ],
}


def answer(**changes) -> bytes:
    return json.dumps({"text": "x", "meta_info": META | changes}).encode()


def test_an_answer_becomes_arrays():
    completion = read_completion(answer())
    assert completion.ids_T == array("i", [5, 6]) and completion.logprobs_T == array("f", [-1.5, -2.0])
    assert type(completion.ids_T[0]) is int and type(completion.logprobs_T[0]) is float
    assert [(span.start, span.end, span.mark) for span in completion.weight_spans] == [
        (0, 1, "ab-2"),
        (1, 2, "ab-3"),
    ]
    # as arrays they are not copied
    assert np.asarray(completion.ids_T).dtype == np.int32
    assert np.shares_memory(np.asarray(completion.logprobs_T), np.frombuffer(completion.logprobs_T, "f4"))  # type: ignore[call-overload]


def test_log_probabilities_lose_nothing():
    bits = np.random.default_rng(0).integers(0, 1 << 32, 20_000, dtype=np.uint64).astype(np.uint32)
    logprobs_T = bits.view(np.float32)
    logprobs_T = np.append(
        logprobs_T[np.isfinite(logprobs_T)], np.array([0.0, -0.0, 1e-45, -3.4028235e38], np.float32)
    )
    tokens = [[float(logprob), 1, None] for logprob in logprobs_T]
    read_T = np.asarray(read_completion(answer(output_token_logprobs=tokens)).logprobs_T)
    assert np.array_equal(read_T.view(np.uint32), logprobs_T.view(np.uint32))


@pytest.fixture
def answering() -> Iterator[tuple[Client, list[bytes], list[bytes]]]:
    """A client, what its server answers (the first of the list), and the bodies that it was sent."""
    answers: list[bytes] = [b""]
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.do_GET()

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(answers[0])))
            self.end_headers()
            self.wfile.write(answers[0])

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Client(f"http://127.0.0.1:{server.server_port}"), answers, bodies
        server.shutdown()


def generate(client: Client, prompt_ids: list[int]) -> Completion:
    async def ask() -> Completion:
        async with client.session() as session:
            return await client.generate(
                session,
                encoded_prompt(prompt_ids),
                temperature=0.5,
                top_p=0.9,
                max_tokens=3,
                stop_token_ids=[2],
            )

    return asyncio.run(ask())


def test_a_request_holds_what_was_asked(answering):
    client, answers, bodies = answering
    answers[0] = answer()
    generate(client, [7, 8])
    assert json.loads(bodies[0]) == {
        "input_ids": [7, 8],
        "sampling_params": {"temperature": 0.5, "top_p": 0.9, "max_new_tokens": 3, "stop_token_ids": [2]},
        "return_logprob": True,
    }


@pytest.mark.parametrize(
    ("sent", "error", "named"),
    [
        (answer()[:-30], ServerLost, "bytes that are no whole JSON: Input data was truncated"),
        (b"", ServerLost, "with 0 bytes that are no whole JSON"),
        (b"<html>", ServerLost, "JSON is malformed"),
        (b'{"text": "x"}', ServerRefused, "missing required field `meta_info`"),
        (answer(output_token_logprobs=None), ServerRefused, "Expected `array`, got `null`"),
        (
            answer(output_token_logprobs=[["a", 1, None]]),
            ServerRefused,
            "got `str` - at `$.meta_info.output_",
        ),
        (answer(output_token_logprobs=[[None, 1, None]]), ServerRefused, "Expected `float`, got `null`"),
        (answer(output_token_logprobs=[[-1.0, 1 << 31, None]]), ServerRefused, "Expected `int`"),
        (answer(output_token_logprobs=[[-1.0]]), ServerRefused, "Expected `array` of at least length 2"),
        (answer(finish_reason={"type": "bored"}), ServerRefused, "Invalid enum value 'bored'"),
        (answer(weight_versions=[{"version": "a"}]), ServerRefused, "missing required field `start`"),
    ],
)
def test_what_is_no_answer_is_one_line(answering, sent, error, named):
    client, answers, _ = answering
    answers[0] = sent
    with pytest.raises(error) as caught:
        generate(client, [1])
    message = str(caught.value)
    assert named in message and client.url in message and "/generate" in message and "\n" not in message
    assert caught.value.__cause__ is None


def test_other_calls_read_their_answers_alike(answering):
    client, answers, _ = answering
    answers[0] = (
        b'{"meta_info": {"input_token_logprobs": [[null, 1, null], [-0.5, 2, null], [null, 3, null]]}}'
    )
    logprobs = client.prompt_logprobs([1, 2, 3])
    assert logprobs[0] == -0.5 and np.isnan(logprobs[1])
    answers[0] = b'{"meta_info": {}}'
    with pytest.raises(ServerRefused, match="missing required field `input_token_logprobs`"):
        client.prompt_logprobs([1, 2])
    answers[0] = b"[]"
    with pytest.raises(ServerRefused, match="answered /model_info with is not what SGLang 0.5.23 answers"):
        client.model_info()


def test_reading_costs_the_same_beside_millions_of_objects():
    """The collector follows nothing that is read, so it has no reason to run."""
    tokens = [[-0.123456789, t % 50_000, None] for t in range(2048)]
    sent = answer(output_token_logprobs=tokens)
    beside = [[(t,)] for t in range(1_000_000)]
    before = [generation["collections"] for generation in gc.get_stats()]
    began = time.thread_time()
    kept = [read_completion(sent) for _ in range(128)]
    us_per_token = (time.thread_time() - began) / 128 / 2048 * 1e6
    ran = [generation["collections"] - b for generation, b in zip(gc.get_stats(), before, strict=True)]
    assert len(beside) == 1_000_000 and len(kept) == 128
    # 262,144 tokens; 700 objects that it follows make it run once
    assert ran[0] <= 4 and ran[2] == 0
    assert us_per_token < 1.0, "0.15 on the machine that this was written on"
