"""What is asked for together: requests, and the responses to them that are there."""

import concurrent.futures
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sdpo_megatron.errors import ServerLost
from sdpo_megatron.records import Rollout

Place = tuple[int, int]
"""Which request of those that were submitted together, and which of its responses."""


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


@dataclass(eq=False, kw_only=True)
class Ticket:
    """Requests that were submitted together; for `Sampler.collect`. Without requests where a rank asks for nothing."""

    requests: Sequence[SampleRequest] = ()
    on_response: Callable[[Place, Rollout], None] | None = None
    """Is given each response once, as soon as it is there, in the sampler's thread: it must not take long."""
    done: dict[Place, Rollout] = field(default_factory=dict)
    """Responses that are there; kept when others fail."""
    losses: list[ServerLost] = field(default_factory=list)
    """Servers that were lost while others answered in their place, since the sampling last began."""
    sampled: "concurrent.futures.Future[None] | None" = None
    """Done when the sampling has ended, one way or another; None where that has been told, or nothing has begun."""

    @property
    def places(self) -> list[Place]:
        return [(p, g) for p, request in enumerate(self.requests) for g in range(request.n)]

    @property
    def lost(self) -> bool:
        """Whether the sampling has ended because no server was left."""
        ended = self.sampled is not None and self.sampled.done()
        return ended and isinstance(self.sampled.exception(), ServerLost)  # type: ignore[union-attr]
