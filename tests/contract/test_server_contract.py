"""What this project relies on in a server, asked of the real SGLang and of the stand-in that other tests use.

Both serve the same tiny checkpoint; transformers on that checkpoint is the judge of every log-probability.
"""

import asyncio
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from sdpo_megatron.algorithm.thoughts import Separated
from sdpo_megatron.config import ServerSettings
from sdpo_megatron.errors import ServerLost, ServerRefused, UserError
from sdpo_megatron.launch.kill_orphans import group_members
from sdpo_megatron.launch.processes import wait_until
from sdpo_megatron.launch.server import ServedModel, ServerProcess
from sdpo_megatron.models.shape import read_model_shape
from sdpo_megatron.rollout.client import Client
from sdpo_megatron.rollout.sampler import Sampler, SamplingAborted
from sdpo_megatron.rollout.ticket import SampleRequest
from sdpo_megatron.rollout.weight_mark import WeightMark
from sdpo_megatron.rollout.wire import Completion, encoded_prompt
from sdpo_megatron.serving.checksums import SentChecksums, differing, tensor_hash
from sdpo_megatron.serving.engines_compared import compare_engines, judge, texts_of
from sdpo_megatron.serving.memory_release import CACHE, WEIGHTS, MemoryRelease
from sdpo_megatron.serving.weight_group import join_weight_group, open_weight_store
from sdpo_megatron.serving.weight_hashes import Served as ServedWeights
from sdpo_megatron.serving.weight_hashes import compare, open_weights
from sdpo_megatron.trainer.alone import AloneModel, only_rank
from tests.small_server import MEMORY
from tests.stand_in_server import stand_in_python

REPOSITORY = Path(__file__).parents[2]
CONTEXT_LENGTH = 512
TOLERANCE = 1e-4
PROMPT = [1] + list(range(300, 340))
TIMEOUT_S = 120.0
SOME_TOKENS_S = 0.5
"""In which a running request samples at least one token, and not hundreds."""

versions = map(str, itertools.count(1))


class Served:
    """A running server and the model that it should answer with."""

    def __init__(self, process: ServerProcess, model: torch.nn.Module, path: Path):
        self.path = path
        self.process = process
        self.client = Client(process.url, process.api_key, TIMEOUT_S)
        self.model = model
        self.version = "0"

    def logprobs(self, prompt: list[int], response: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
        """Of the response's tokens, by transformers."""
        with torch.no_grad():
            logits = self.model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        table = (logits / temperature).log_softmax(-1)
        return table.gather(1, torch.tensor(response)[:, None])[:, 0]

    def generate(self, prompt: list[int], n: int = 1, **parameters) -> list[Completion]:
        arguments = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 12, "stop_token_ids": []}

        async def ask() -> list[Completion]:
            async with self.client.session() as session:
                encoded = encoded_prompt(prompt)
                await self.client.prefill(session, encoded)
                one = (self.client.generate(session, encoded, **(arguments | parameters)) for _ in range(n))
                return await asyncio.gather(*one)

        return asyncio.run(ask())

    def busy(self) -> bool:
        """Whether requests are under way."""
        try:
            self.client.flush_cache()
        except ServerRefused:
            return True
        return False

    def assert_answers_with_its_model(self) -> None:
        expected = self.logprobs(PROMPT[:1], PROMPT[1:])
        found = torch.tensor(self.client.prompt_logprobs(PROMPT))
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@pytest.fixture(scope="module", params=["stand_in", "sglang"])
def served(
    request: pytest.FixtureRequest, tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("served")
    python = REPOSITORY / ".venv-sglang/bin/python"
    if request.param == "stand_in":
        python = stand_in_python(directory / "python")
    elif not python.exists():
        pytest.fail(f"{python} is missing: run `make .venv-sglang`")
    settings = ServerSettings(python=str(python))
    model = ServedModel(
        path=tiny_model(),
        dtype="float32",
        device="cpu",
        context_length=CONTEXT_LENGTH,
        max_responses=16,
        memory=MEMORY,
        seed=1,
    )
    process = ServerProcess(settings, model, directory / "server.log")
    process.start()
    try:
        process.wait_healthy()
        if request.param == "stand_in":
            slow = {"path": "/generate", "kind": "slow", "seconds": 0.01}
            httpx.post(f"{process.url}/_test/fault", json=slow).raise_for_status()
        yield Served(
            process, AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32), tiny_model()
        )
    finally:
        process.stop()


@pytest.fixture
def background() -> Iterator[Callable[..., Future]]:
    """Runs a call in a thread."""
    with ThreadPoolExecutor(8) as pool:
        yield pool.submit


def assert_tiles(completion: Completion) -> None:
    """The spans cover every token once, in order."""
    edges = [0, *(span.end for span in completion.weight_spans)]
    assert [span.start for span in completion.weight_spans] == edges[:-1]
    assert edges[-1] == len(completion.ids_T)


# ------------------------------------------------------------ sampling, scoring


def test_reports_its_weight_version_as_a_string(served: Served):
    assert served.client.model_info()["weight_version"] == served.version


def test_logprobs_of_sampled_tokens_are_tempered(served: Served):
    completions = served.generate(PROMPT, n=4, temperature=0.7)
    assert len(completions) == 4
    assert len({tuple(c.ids_T) for c in completions}) > 1
    for completion in completions:
        expected = served.logprobs(PROMPT, completion.ids_T, temperature=0.7)
        torch.testing.assert_close(torch.tensor(completion.logprobs_T), expected, atol=TOLERANCE, rtol=0)
        assert_tiles(completion)
        assert {span.mark for span in completion.weight_spans} == {served.version}


def test_logprobs_are_not_renormalised_over_the_nucleus(served: Served):
    for completion in served.generate(PROMPT, n=4, top_p=0.3):
        expected = served.logprobs(PROMPT, completion.ids_T)
        torch.testing.assert_close(torch.tensor(completion.logprobs_T), expected, atol=TOLERANCE, rtol=0)


def test_temperature_zero_is_greedy_with_untempered_logprobs(served: Served):
    (completion,) = served.generate(PROMPT, temperature=0.0)
    with torch.no_grad():
        logits = served.model(torch.tensor([[*PROMPT, *completion.ids_T]])).logits[0, len(PROMPT) - 1 : -1]
    assert logits.argmax(-1).tolist() == list(completion.ids_T)
    expected = served.logprobs(PROMPT, completion.ids_T)
    torch.testing.assert_close(torch.tensor(completion.logprobs_T), expected, atol=TOLERANCE, rtol=0)


def test_stop_token_is_part_of_the_response(served: Served):
    stops = set(range(0, 1026, 3))
    completions = served.generate(PROMPT, n=8, max_tokens=100, stop_token_ids=sorted(stops))
    assert any(len(c.ids_T) > 1 for c in completions)
    for completion in completions:
        assert completion.finish_reason == "stop"
        assert completion.ids_T[-1] in stops
        assert not stops & set(completion.ids_T[:-1])


def test_a_response_cut_by_length_has_all_its_tokens_up_to_the_context_length(served: Served):
    prompt = [300 + i % 97 for i in range(CONTEXT_LENGTH - 7)]
    cut = [c for c in served.generate(prompt, n=4, max_tokens=7) if c.finish_reason == "length"]
    assert cut
    assert {len(c.ids_T) for c in cut} == {7}


def test_more_than_the_context_length_is_refused(served: Served):
    with pytest.raises(ServerRefused, match="answered /generate with 400"):
        served.generate([300] * CONTEXT_LENGTH, max_tokens=50)


def test_prompt_logprobs_are_untempered_and_complete_even_if_cached(served: Served):
    served.generate(PROMPT)
    for _ in range(2):
        assert len(served.client.prompt_logprobs(PROMPT)) == len(PROMPT) - 1
        served.assert_answers_with_its_model()


def test_the_likeliest_token_at_each_place_of_a_prompt(served: Served):
    with torch.no_grad():
        expected = served.model(torch.tensor([PROMPT])).logits[0, :-1].argmax(-1)
    logprobs, likeliest = served.client.ranked_prompt(PROMPT)
    assert likeliest == expected.tolist() and logprobs == served.client.prompt_logprobs(PROMPT)


def test_prompts_of_many_lengths_at_once(served: Served, background: Callable[..., Future]):
    """Some behind a prefix that is cached, some after one that is not."""
    prompts = [[400 + i % 83 for i in range(length)] for length in (3, 450, 41, 120, 1, 350)]
    prompts += [PROMPT + [500 + i] * (1 + i) for i in range(2)]
    served.generate(PROMPT)
    asked = [(prompt, background(served.generate, prompt, n=2, max_tokens=20)) for prompt in prompts]
    for prompt, future in asked:
        for completion in future.result(TIMEOUT_S):
            expected = served.logprobs(prompt, completion.ids_T)
            torch.testing.assert_close(torch.tensor(completion.logprobs_T), expected, atol=1e-5, rtol=0)


def test_a_wrong_key_is_refused_but_health_needs_none(served: Served):
    stranger = Client(served.process.url, "wrong", TIMEOUT_S)
    assert stranger.healthy()
    with pytest.raises(UserError, match="answered /model_info with 401: it wants another key; write"):
        stranger.model_info()


def test_its_hashes_are_those_of_the_directory_that_it_serves(
    served: Served, tiny_model: Callable[..., Path]
):
    running = open_weights(served.process.url, api_key=served.process.api_key)
    assert isinstance(running, ServedWeights) and running.tp == 1 and running.hashed is tensor_hash
    own, other = (open_weights(str(tiny_model(seed=seed))) for seed in (0, 1))
    assert compare(own, running).same and compare(running, own).same
    assert len(compare(running, other).differing) == compare(running, other).compared > 20


def test_it_agrees_with_the_trainer_on_what_it_reads_and_samples(served: Served):
    ids = [300 + i * i % 701 for i in range(400)]
    shape = read_model_shape(served.path)
    with only_rank("cpu") as parallel:
        model = AloneModel(served.path, shape, "float32", parallel)
        tokens = compare_engines(model, served.client, texts_of(ids, 140), 16, shape.eos_ids)
    verdict = judge(tokens, 1.0)
    assert verdict.agree, verdict.reasons
    of_all = {row.part: row for row in verdict.rows if row.last is None}
    assert of_all["read"].tokens == of_all["read"].agreed == 139 + 4 * 63 and of_all["sampled"].tokens >= 4


# -------------------------------------------------------- requests in flight


def start_long(served: Served, background: Callable[..., Future]) -> Future:
    """Eight long responses; returns once they are under way."""
    future = background(served.generate, PROMPT, n=8, max_tokens=400)
    assert wait_until(served.busy, 30.0)
    time.sleep(SOME_TOKENS_S)
    assert not future.done()
    return future


def test_flush_is_refused_while_running_and_allowed_once_paused(served: Served, background):
    future = start_long(served, background)
    with pytest.raises(ServerRefused):
        served.client.flush_cache()
    served.client.pause()
    served.client.flush_cache()
    served.client.resume()
    completions = future.result(TIMEOUT_S)
    assert any(c.finish_reason == "length" and len(c.ids_T) == 400 for c in completions)
    for completion in completions:
        expected = served.logprobs(PROMPT, completion.ids_T)
        torch.testing.assert_close(torch.tensor(completion.logprobs_T), expected, atol=TOLERANCE, rtol=0)


def test_a_paused_server_is_healthy_and_holds_new_requests(served: Served, background):
    served.client.pause()
    try:
        assert served.client.healthy()
        future = background(served.generate, PROMPT)
        time.sleep(0.5)
        assert not future.done()
    finally:
        served.client.resume()
    assert len(future.result(TIMEOUT_S)) == 1
    served.client.resume()  # harmless


def test_an_aborted_sampler_leaves_the_server_idle(served: Served):
    sampler = Sampler(
        [served.client],
        stop_token_ids=[],
        max_context_length=CONTEXT_LENGTH,
        max_concurrent=4,
        idle_timeout_s=TIMEOUT_S,
        separate=lambda prompt, ids: Separated(thought="", answer="", closed=True),
        train_truncated=True,
        mark=WeightMark("a"),
    )
    ticket = sampler.submit(
        [SampleRequest(id="long", prompt_ids=PROMPT, n=8, temperature=1.0, max_tokens=400)]
    )
    assert wait_until(served.busy, 30.0)
    sampler.abort()
    with pytest.raises(SamplingAborted):
        sampler.collect(ticket)
    assert wait_until(lambda: not served.busy(), 30.0)


# --------------------------------------------------------------- weight updates


@pytest.fixture
def group(served: Served, background) -> Iterator[dist.ProcessGroup]:
    name = f"weights-{os.getpid()}-{time.monotonic_ns()}"
    store = open_weight_store("127.0.0.1", TIMEOUT_S)
    joining = background(
        served.client.init_update_group,
        host="127.0.0.1",
        port=store.port,
        rank_offset=1,
        world_size=2,
        group_name=name,
        backend="gloo",
    )
    group = join_weight_group(store, 2, 0, name, "gloo", TIMEOUT_S)
    joining.result(TIMEOUT_S)
    yield group
    leaving = background(served.client.destroy_update_group, name)
    dist.destroy_process_group(group)
    leaving.result(TIMEOUT_S)


def new_weights(served: Served, scale: float = 0.05) -> list[tuple[str, torch.Tensor]]:
    """Changes the judge's weights; returns them under their Hugging Face names."""
    with torch.no_grad():
        for parameter in served.model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return [(name, parameter.detach()) for name, parameter in served.model.named_parameters()]


def send(
    served: Served,
    background,
    group: dist.ProcessGroup,
    weights: list[tuple[str, torch.Tensor]],
    version: str | None,
) -> None:
    """One bucket."""
    receiving = background(
        served.client.update_from_distributed,
        names=[name for name, _ in weights],
        dtypes=["float32"] * len(weights),
        shapes=[tuple(weight.shape) for _, weight in weights],
        group_name=group.group_name,
        version=version,
    )
    flat = torch.cat([weight.flatten().view(torch.uint8) for _, weight in weights])
    dist.broadcast(flat, src=0, group=group)
    receiving.result(TIMEOUT_S)


def test_a_weight_update_changes_what_the_server_answers(served: Served, background, group):
    served.generate(PROMPT)  # cached under the old weights
    before = served.client.prompt_logprobs(PROMPT)
    weights = new_weights(served)
    served.version = next(versions)
    served.client.pause()
    served.client.flush_cache()
    served.client.begin_update()
    half = len(weights) // 2
    send(served, background, group, weights[:half], None)
    send(served, background, group, weights[half:], served.version)
    served.client.end_update()
    served.client.resume()
    after = served.client.prompt_logprobs(PROMPT)
    assert max(abs(a - b) for a, b in zip(after, before, strict=True)) > 0.1
    served.assert_answers_with_its_model()
    assert served.client.model_info()["weight_version"] == served.version
    (completion,) = served.generate(PROMPT)
    assert {span.mark for span in completion.weight_spans} == {served.version}
    # 1026 tokens, which the server fills up to 1088
    sent = SentChecksums(read_model_shape(served.path), 1)
    for name, weight in weights:
        sent.add(name, weight)
    held = served.client.weight_checksums()
    assert held is not None and differing(sent.by_rank, held) == []
    sent.add("model.norm.weight", weights[-1][1] + 1.0)
    assert differing(sent.by_rank, held) == ["model.norm.weight"]


def test_a_response_across_an_update_says_which_tokens_came_from_which_weights(
    served: Served, background, group
):
    old, served.version = served.version, next(versions)
    future = start_long(served, background)
    served.client.pause()
    served.client.flush_cache()
    served.client.begin_update()
    send(served, background, group, new_weights(served, 0.001), served.version)
    served.client.end_update()
    served.client.resume()
    completions = future.result(TIMEOUT_S)
    for completion in completions:
        assert_tiles(completion)
    both = [c for c in completions if [s.mark for s in c.weight_spans] == [old, served.version]]
    assert both
    # the tokens after the update are the new weights', computed afresh
    completion, start = both[0], both[0].weight_spans[1].start
    expected = served.logprobs(PROMPT, completion.ids_T)[start:]
    found = torch.tensor(completion.logprobs_T)[start:]
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_weights_are_refused_outside_an_update(served: Served, group):
    with pytest.raises(ServerRefused, match="between"):
        served.client.update_from_distributed(
            names=["model.norm.weight"],
            dtypes=["float32"],
            shapes=[[96]],
            group_name=group.group_name,
            version=None,
        )


def test_an_update_left_open_is_closed_by_the_next_one(served: Served):
    served.client.begin_update()
    served.client.begin_update()
    served.client.end_update()
    with pytest.raises(ServerRefused, match="no weight-update session"):
        served.client.end_update()


def test_memory_is_released_and_taken_back_around_an_update(served: Served, background, group):
    """On a CPU the calls, their order and the answers are the same, but no memory is released."""
    served.generate(PROMPT, n=4)
    release = MemoryRelease(WeightMark("ab"))
    release.begin(served.client)
    assert served.client.healthy()
    # what came meanwhile is answered from the new weights
    waiting = background(served.generate, PROMPT)
    weights = new_weights(served)
    served.version = "ab-1"
    served.client.pause()
    served.client.flush_cache()
    served.client.resume_memory([WEIGHTS])
    served.client.begin_update()
    send(served, background, group, weights, served.version)
    served.client.end_update()
    served.client.flush_cache()
    served.client.resume_memory([CACHE])
    served.client.resume()
    (completion,) = waiting.result(TIMEOUT_S)
    assert {span.mark for span in completion.weight_spans} == {"ab-1"}
    served.assert_answers_with_its_model()
    # and again, now that it has weights of the run
    served.generate(PROMPT)
    release.begin(served.client)
    release.take_back_weights(served.client)
    release.take_back_cache(served.client)
    served.client.resume()
    served.assert_answers_with_its_model()


# ------------------------------------------------------------- last: its death


def test_a_killed_server_is_lost_and_leaves_no_process(served: Served, background):
    future = start_long(served, background)
    pid = served.process.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ServerLost, match="cannot be reached for /generate"):
        future.result(TIMEOUT_S)
    with pytest.raises(ServerLost):
        served.client.prompt_logprobs(PROMPT)
    assert not served.client.healthy()
    assert wait_until(lambda: not served.process.alive(), 10.0)
    assert wait_until(lambda: not group_members(pid), 10.0)


@pytest.mark.parametrize("under_way", [True, False])
def test_memory_released_while_something_runs_or_taken_back_unreleased_ends_it(
    served: Served, background, under_way: bool
):
    """Which is why serving/memory_release.py pauses and flushes first, and remembers what it has released."""
    served.process.stop()
    served.process.start()
    served.process.wait_healthy()
    future = start_long(served, background) if under_way else None
    with pytest.raises(ServerLost):
        if under_way:
            served.client.release_memory([CACHE, WEIGHTS])
        else:
            served.client.resume_memory([WEIGHTS])
    if future is not None:
        with pytest.raises(ServerLost):
            future.result(TIMEOUT_S)
    assert wait_until(lambda: not served.process.alive(), 30.0)
