"""Prompts in, rollouts out: `submit` starts sampling in the background, `collect` waits for it.

Each response is a request of its own. Where a server is lost, the others are asked for what it had under way; where
none is left, what is submitted and not yet collected survives: collect again.
"""

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sdpo_megatron.algorithm.thoughts import Separated
from sdpo_megatron.errors import ServerLost, UserError
from sdpo_megatron.records import Rollout, WeightSpan
from sdpo_megatron.rollout.client import Client, Completion
from sdpo_megatron.rollout.watched_server import WatchedServer
from sdpo_megatron.rollout.weight_mark import WeightMark

Place = tuple[int, int]
"""Which request of those that were submitted, and which of its responses."""


class SamplingAborted(Exception):
    """`Sampler.abort` was called while `collect` waited."""


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """A request for n responses to one prompt."""

    id: str
    prompt_ids: list[int]
    n: int
    temperature: float
    """0 takes the likeliest token."""
    top_p: float = 1.0
    max_tokens: int


class Sampler:
    """Spreads groups over servers, group i to server i mod the number of servers, whose cache then holds its prompt.

    `max_context_length`: tokens of prompt plus response; a response's `max_tokens` is cut to the room its
    prompt leaves. `max_concurrent`: responses under way at once. `idle_timeout_s`: how long a server may answer
    none of the responses that it was asked for; then it counts as hung. `separate`: ids of a prompt and of a response
    to it -> the response's thought and answer. `train_truncated`: whether responses that did not end by themselves
    have a loss. `mark`: the mark of the run's own weights, the only ones that may answer.
    """

    def __init__(
        self,
        clients: Sequence[Client],
        *,
        stop_token_ids: Sequence[int],
        max_context_length: int,
        max_concurrent: int,
        idle_timeout_s: float,
        separate: Callable[[list[int], list[int]], Separated],
        train_truncated: bool,
        mark: WeightMark,
    ):
        self._clients = list(clients)
        self._stop_token_ids = list(stop_token_ids)
        self._max_context_length = max_context_length
        self._max_concurrent = max_concurrent
        self._idle_timeout_s = idle_timeout_s
        self._separate = separate
        self._train_truncated = train_truncated
        self._mark = mark
        self._requests: list[SampleRequest] = []
        self._done: dict[Place, Rollout] = {}
        """Responses that are there; kept when others fail."""
        self.losses: list[ServerLost] = []
        """Servers that were lost while the last submitted requests were sampled."""
        self.answered = 0
        """Responses that came since the sampler was made."""
        self._prefills: dict[tuple[str, str], asyncio.Future[None]] = {}
        """By request and server, whose event loop is that of the sampling under way."""
        self._work: _BackgroundWork | None = None

    def submit(self, requests: Sequence[SampleRequest]) -> None:
        """Starts sampling. Raises UserError for a prompt that leaves no room for a response."""
        if self._requests:
            raise RuntimeError(f"{len(self._requests)} requests are already submitted: collect them first")
        for request in requests:
            self._response_room(request)
        self._requests = list(requests)
        self._start()

    def collect(self) -> list[list[Rollout]]:
        """Returns the rollouts of every submitted request, in order. Blocks; signal handlers run meanwhile.

        Raises ServerLost (call it again once the server is back: only what is missing is sampled again),
        ServerRefused, UserError where another run pushes to the server, and SamplingAborted after `abort`."""
        self.losses = []
        if self._work is None:
            self._start()
        assert self._work is not None
        try:
            self._work.wait()
        finally:
            self._work = None
        rollouts = [[self._done[p, g] for g in range(request.n)] for p, request in enumerate(self._requests)]
        self._requests, self._done = [], {}
        return rollouts

    def abort(self) -> None:
        """Stops sampling; a `collect` that waits raises SamplingAborted. What was submitted stays submitted.

        Safe from signal handlers and other threads: nothing is awaited here. Dropping the connections is
        what tells the servers."""
        if self._work is not None:
            self._work.cancel()

    def _response_room(self, request: SampleRequest) -> int:
        room = self._max_context_length - len(request.prompt_ids)
        if room < 1:
            raise UserError(
                f"the prompt of {request.id} has {len(request.prompt_ids)} tokens, which leaves no room for "
                f"a response in model.max_context_length={self._max_context_length}: raise it, or leave the "
                "problem out"
            )
        return min(request.max_tokens, room)

    def _start(self) -> None:
        self._work = _BackgroundWork(self._sample_missing)

    async def _sample_missing(self) -> None:
        slots = asyncio.Semaphore(self._max_concurrent)
        servers = [WatchedServer(client, self._idle_timeout_s) for client in self._clients]
        places = [(p, g) for p, request in enumerate(self._requests) for g in range(request.n)]
        tasks = [
            asyncio.create_task(self._sample(place, servers, slots))
            for place in places
            if place not in self._done
        ]
        self._prefills.clear()
        watches = [asyncio.create_task(server.watch()) for server in servers]
        try:
            await asyncio.gather(*tasks)
        finally:
            others = [*watches, *self._prefills.values()]
            for task in [*tasks, *others]:
                task.cancel()
            await asyncio.gather(*tasks, *others, return_exceptions=True)
            self.losses = [server.lost for server in servers if server.lost is not None]
            for server in servers:
                await server.session.aclose()

    async def _sample(self, place: Place, servers: Sequence[WatchedServer], slots: asyncio.Semaphore) -> None:
        """Samples one response. Raises ServerLost where no server is left to ask."""
        request = self._requests[place[0]]
        async with slots:
            while True:
                first = place[0] % len(servers)
                server = next(
                    (s for s in [*servers[first:], *servers[:first]] if s.lost is None), servers[first]
                )
                try:
                    self._done[place] = await server.ask(
                        lambda server=server: self._response(request, server)
                    )
                except ServerLost:
                    if all(other.lost is not None for other in servers):
                        raise
                else:
                    self.answered += 1
                    return

    async def _prefilled(self, request: SampleRequest, server: WatchedServer) -> None:
        """Returns once the server has the prompt in its cache: siblings that come together would each compute it."""
        key = (request.id, server.client.url)
        if key not in self._prefills:
            self._prefills[key] = asyncio.ensure_future(
                server.client.prefill(server.session, request.prompt_ids)
            )
        # a sibling that is cancelled leaves it to the others
        await asyncio.shield(self._prefills[key])

    async def _response(self, request: SampleRequest, server: WatchedServer) -> Rollout:
        if request.n > 1:
            await self._prefilled(request, server)
        completion = await server.client.generate(
            server.session,
            request.prompt_ids,
            temperature=request.temperature,
            top_p=request.top_p,
            max_tokens=self._response_room(request),
            stop_token_ids=self._stop_token_ids,
        )
        return self._rollout(request, completion, server.client.url)

    def _rollout(self, request: SampleRequest, completion: Completion, url: str) -> Rollout:
        tokens = len(completion.ids_T)
        separated = self._separate(request.prompt_ids, completion.ids_T)
        trained = self._train_truncated or completion.finish_reason == "stop"
        return Rollout(
            prompt_ids=request.prompt_ids,
            response_ids_T=completion.ids_T,
            rollout_logprobs_T=completion.logprobs_T,
            loss_mask_T=[int(trained)] * tokens,
            weight_spans=[
                WeightSpan(start=span.start, end=span.end, version=self._mark.read(span.mark, url))
                for span in completion.weight_spans
            ],
            finish_reason=completion.finish_reason if separated.closed else "thinking",
            text=separated.answer,
            thought=separated.thought,
        )


class _BackgroundWork:
    """A coroutine that runs in an event loop and a daemon thread of its own."""

    def __init__(self, start: Callable[[], Any]):
        self._result: concurrent.futures.Future[None] = concurrent.futures.Future()
        # reentrant: a signal handler may cancel while its thread does
        self._closing = threading.RLock()
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(start())
        threading.Thread(target=self._run, name="sampler", daemon=True).start()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._task)
        except asyncio.CancelledError:
            self._result.set_exception(SamplingAborted("sampling was aborted"))
        # handed to the thread that waits
        except BaseException as error:
            self._result.set_exception(error)
        else:
            self._result.set_result(None)
        finally:
            with self._closing:
                self._loop.close()

    def wait(self) -> None:
        self._result.result()

    def cancel(self) -> None:
        with self._closing:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._task.cancel)
