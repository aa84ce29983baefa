"""A server that is asked for many responses at once, and whether it still answers."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import httpx

from sdpo_megatron.errors import ServerLost
from sdpo_megatron.rollout.client import Client

Answer = TypeVar("Answer")


class WatchedServer:
    """One server within one event loop. It is lost when a request to it fails, or when it answers none of those that
    are under way within the idle limit: not because it has much to do. What was under way then fails together."""

    def __init__(self, client: Client, idle_timeout_s: float):
        self.client = client
        self.url = client.url
        """Where it is asked; the client may move meanwhile."""
        self.session: httpx.AsyncClient = client.session()
        self.lost: ServerLost | None = None
        self._idle_timeout_s = idle_timeout_s
        self._under_way: set[asyncio.Task] = set()
        self._since = 0.0
        """When it last answered, or was asked after it had nothing to do."""
        self._watch = asyncio.ensure_future(self._lose_when_idle())

    async def leave(self) -> None:
        """Ends watching it, and its session."""
        self._watch.cancel()
        await self.session.aclose()

    async def ask(self, question: Callable[[], Awaitable[Answer]]) -> Answer:
        """Returns the answer. Raises ServerLost where the server is or gets lost meanwhile."""
        if self.lost is not None:
            raise self.lost
        loop = asyncio.get_running_loop()
        if not self._under_way:
            self._since = loop.time()
        task = asyncio.ensure_future(question())
        self._under_way.add(task)
        try:
            answer = await task
        except ServerLost as error:
            self._lose(error)
            raise
        except asyncio.CancelledError:
            # it may be the one who asks that is cancelled
            asker = asyncio.current_task()
            if self.lost is not None and asker is not None and not asker.cancelling():
                raise self.lost from None
            raise
        finally:
            self._under_way.discard(task)
        self._since = loop.time()
        return answer

    async def _lose_when_idle(self) -> None:
        loop, limit = asyncio.get_running_loop(), self._idle_timeout_s
        while self.lost is None:
            await asyncio.sleep(max(0.05, min(limit / 10, self._since + limit - loop.time())))
            if self._under_way and loop.time() - self._since > limit:
                self._lose(
                    ServerLost(
                        f"the server at {self.url} answered none of the {len(self._under_way)} requests under "
                        f"way within rollout.idle_timeout_s={limit:g} s: it hangs, or a single response takes longer; "
                        "then raise that limit, or lower rollout.max_tokens",
                        self.url,
                    )
                )

    def _lose(self, error: ServerLost) -> None:
        if self.lost is None:
            self.lost = error
        for task in self._under_way:
            task.cancel()
