"""Prompts in, rollouts out: `submit` starts sampling in the background, `collect` waits for it.

Each response is a request of its own, and several tickets may be under way together. Where a server is lost, the others
are asked for what it had under way; where none is left, what is submitted and not yet collected survives: collect
again.
"""

import asyncio
import concurrent.futures
import hashlib
import threading
from array import array
from collections.abc import Callable, Mapping, Sequence

import msgspec

from sdpo_megatron.algorithm.thoughts import Separated
from sdpo_megatron.errors import ServerLost, UserError
from sdpo_megatron.records import Rollout, WeightSpan
from sdpo_megatron.rollout.client import Client
from sdpo_megatron.rollout.ticket import Place, SampleRequest, Ticket
from sdpo_megatron.rollout.watched_server import WatchedServer
from sdpo_megatron.rollout.weight_mark import MarkReader
from sdpo_megatron.rollout.wire import Completion, encoded_prompt

WAITS_S = 1.0
"""How often `collect` says that it still waits."""


class SamplingAborted(Exception):
    """`Sampler.abort` was called while `collect` waited."""


Prefills = dict[tuple[str, WatchedServer], asyncio.Future[None]]
"""Prompts that servers have, or are putting, into their caches: by request and server."""


class Sampler:
    """Spreads groups over servers, group i to server i mod the number of servers, whose cache then holds its prompt.

    `max_context_length`: tokens of prompt plus response; a response's `max_tokens` is cut to the room its
    prompt leaves. `max_concurrent`: responses under way at once, of all tickets. `idle_timeout_s`: how long a server
    may answer none of the responses that it was asked for; then it counts as hung. `separate`: ids of a prompt and of a
    response to it -> the response's thought and answer. `train_truncated`: whether responses that did not end by
    themselves have a loss. `mark`: the mark of the run's own weights, the only ones that may answer.
    `while_waiting`: called each second while `collect` waits, which has limits of its own.
    """

    def __init__(
        self,
        clients: Sequence[Client],
        *,
        stop_token_ids: Sequence[int],
        max_context_length: int,
        max_concurrent: int,
        idle_timeout_s: float,
        separate: Callable[[Sequence[int], Sequence[int]], Separated],
        train_truncated: bool,
        mark: MarkReader,
        while_waiting: Callable[[], None] = lambda: None,
    ):
        self._clients = list(clients)
        self._stop_token_ids = list(stop_token_ids)
        self._max_context_length = max_context_length
        self._idle_timeout_s = idle_timeout_s
        self._separate = separate
        self._train_truncated = train_truncated
        self._mark = mark
        self._while_waiting = while_waiting
        self._tickets: list[Ticket] = []
        """Those that are not yet collected."""
        self.answered = 0
        """Responses that came since the sampler was made."""
        self._loop: asyncio.AbstractEventLoop | None = None
        # what follows belongs to the loop's thread
        self._tasks: set[asyncio.Task] = set()
        """A task for each ticket under way."""
        self._slots = asyncio.Semaphore(max_concurrent)
        self._servers: list[WatchedServer] = []
        self._former_servers: list[WatchedServer] = []
        """Those that were replaced while tickets were under way, which may have asked them."""

    def submit(
        self,
        requests: Sequence[SampleRequest],
        on_response: Callable[[Place, Rollout], None] | None = None,
        done: Mapping[Place, Rollout] | None = None,
    ) -> Ticket:
        """Starts sampling. `on_response` is given each response once, as soon as it is there, in the sampler's thread;
        not those that are `done` already, which nobody is asked for.

        Raises UserError for a prompt that leaves no room for a response."""
        for request in requests:
            self._response_room(request)
        ticket = Ticket(requests=list(requests), on_response=on_response, done=dict(done or {}))
        self._tickets.append(ticket)
        self._start(ticket)
        return ticket

    def collect(self, ticket: Ticket) -> list[list[Rollout]]:
        """Returns the rollouts of every request of the ticket, in order; once. Blocks; signal handlers run meanwhile.

        Raises ServerLost (call it again once the server is back: only what is missing is sampled again),
        ServerRefused, UserError where another run pushes to the server, and SamplingAborted after `abort`."""
        if ticket not in self._tickets:
            raise RuntimeError("this ticket has been collected, or is another sampler's")
        if ticket.sampled is None:
            # what cost this one the servers cost the others them too
            for stopped in [other for other in self._tickets if other.sampled is None or other.lost]:
                self._start(stopped)
        assert ticket.sampled is not None
        while not concurrent.futures.wait([ticket.sampled], WAITS_S).done:
            self._while_waiting()
        try:
            ticket.sampled.result()
        except BaseException:
            ticket.sampled = None
            raise
        self._tickets.remove(ticket)
        return [[ticket.done[p, g] for g in range(request.n)] for p, request in enumerate(ticket.requests)]

    def digest(self, requests: Sequence[SampleRequest]) -> str:
        """Returns a digest of all that decides, besides weights and chance, what responses to `requests` may be."""
        settings = (self._stop_token_ids, self._max_context_length, self._train_truncated)
        return hashlib.sha256(msgspec.json.encode((settings, requests))).hexdigest()

    def abort(self) -> None:
        """Stops sampling; a `collect` that waits raises SamplingAborted. What was submitted stays submitted.

        Safe from signal handlers and other threads: nothing is awaited here. Dropping the connections is
        what tells the servers."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        for task in self._tasks:
            task.cancel()

    def _response_room(self, request: SampleRequest) -> int:
        room = self._max_context_length - len(request.prompt_ids)
        if room < 1:
            raise UserError(
                f"the prompt of {request.id} has {len(request.prompt_ids)} tokens, which leaves no room for "
                f"a response in model.max_context_length={self._max_context_length}: raise it, or leave the "
                "problem out"
            )
        return min(request.max_tokens, room)

    def _start(self, ticket: Ticket) -> None:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="sampler", daemon=True).start()
        ticket.losses.clear()
        ticket.sampled = concurrent.futures.Future()
        self._loop.call_soon_threadsafe(self._begin, ticket, ticket.sampled)

    def _begin(self, ticket: Ticket, sampled: "concurrent.futures.Future[None]") -> None:
        task = asyncio.ensure_future(self._sample_missing(ticket), loop=self._loop)
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._end(task, sampled))

    def _end(self, task: asyncio.Task, sampled: "concurrent.futures.Future[None]") -> None:
        self._tasks.discard(task)
        if task.cancelled():
            sampled.set_exception(SamplingAborted("sampling was aborted"))
        elif (error := task.exception()) is not None:
            sampled.set_exception(error)
        else:
            sampled.set_result(None)

    def _meet_servers(self) -> None:
        """Gives every server that was lost, or has moved, another chance."""
        if not self._servers:
            self._servers = [WatchedServer(client, self._idle_timeout_s) for client in self._clients]
        for place, server in enumerate(self._servers):
            if server.lost is not None or server.url != server.client.url:
                self._former_servers.append(server)
                self._servers[place] = WatchedServer(server.client, self._idle_timeout_s)

    async def _leave_servers(self) -> None:
        servers, self._servers, self._former_servers = [*self._servers, *self._former_servers], [], []
        for server in servers:
            await server.leave()

    async def _sample_missing(self, ticket: Ticket) -> None:
        self._meet_servers()
        prefills: Prefills = {}
        prompts = [encoded_prompt(request.prompt_ids) for request in ticket.requests]
        tasks = [
            asyncio.ensure_future(self._sample(ticket, place, prompts[place[0]], prefills))
            for place in ticket.places
            if place not in ticket.done
        ]
        try:
            await asyncio.gather(*tasks)
        finally:
            others = [*tasks, *prefills.values()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            if self._tasks == {asyncio.current_task()}:
                await self._leave_servers()

    async def _sample(self, ticket: Ticket, place: Place, prompt: msgspec.Raw, prefills: Prefills) -> None:
        """Samples one response. Raises ServerLost where no server is left to ask."""
        request, first = ticket.requests[place[0]], place[0] % len(self._clients)
        async with self._slots:
            while True:
                in_turn = [*self._servers[first:], *self._servers[:first]]
                server = next((server for server in in_turn if server.lost is None), in_turn[0])
                try:
                    rollout = await server.ask(
                        lambda server=server: self._response(request, prompt, server, prefills)
                    )
                except ServerLost as error:
                    if all(other.lost is not None for other in self._servers):
                        raise
                    loss = server.lost or error
                    if loss not in ticket.losses:
                        ticket.losses.append(loss)
                else:
                    self.answered += 1
                    ticket.done[place] = rollout
                    if ticket.on_response is not None:
                        ticket.on_response(place, rollout)
                    return

    async def _response(
        self, request: SampleRequest, prompt: msgspec.Raw, server: WatchedServer, prefills: Prefills
    ) -> Rollout:
        if request.n > 1:
            # siblings that come together would each compute the prompt
            key = (request.id, server)
            if key not in prefills:
                prefills[key] = asyncio.ensure_future(server.client.prefill(server.session, prompt))
            # a sibling that is cancelled leaves it to the others
            await asyncio.shield(prefills[key])
        completion = await server.client.generate(
            server.session,
            prompt,
            temperature=request.temperature,
            top_p=request.top_p,
            max_tokens=self._response_room(request),
            stop_token_ids=self._stop_token_ids,
        )
        return self._rollout(request, completion, server.url)

    def _rollout(self, request: SampleRequest, completion: Completion, url: str) -> Rollout:
        tokens = len(completion.ids_T)
        separated = self._separate(request.prompt_ids, completion.ids_T)
        trained = self._train_truncated or completion.finish_reason == "stop"
        return Rollout(
            prompt_ids=request.prompt_ids,
            response_ids_T=completion.ids_T,
            rollout_logprobs_T=completion.logprobs_T,
            loss_mask_T=array("B", [trained]) * tokens,
            weight_spans=[
                WeightSpan(start=span.start, end=span.end, version=self._mark.read(span.mark, url))
                for span in completion.weight_spans
            ],
            finish_reason=completion.finish_reason if separated.closed else "thinking",
            text=separated.answer,
            thought=separated.thought,
        )
