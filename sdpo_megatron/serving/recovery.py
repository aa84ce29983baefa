"""The policy behind its servers: what is asked of them survives a lost server. All ranks call every method together."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field
from pathlib import Path

from sdpo_megatron.errors import RunFailed, ServerLost, ServerRefused, UserError
from sdpo_megatron.models.shape import ModelShape, read_model_shape
from sdpo_megatron.records import Rollout
from sdpo_megatron.rollout.client import HEALTH_TIMEOUT_S, Client
from sdpo_megatron.rollout.sampler import Sampler, SamplingAborted
from sdpo_megatron.rollout.ticket import Place, SampleRequest, Ticket
from sdpo_megatron.run_dir.server_files import ServerFiles
from sdpo_megatron.serving.canary import Canary
from sdpo_megatron.serving.push import WeightSync
from sdpo_megatron.stopping import Stopped, StopRequest
from sdpo_megatron.trainer.parallel import ParallelState

POLL_S = 0.5
UNSEEN_BY_WEIGHTS = ("max_positions", "eos_ids")
"""The parts of a model's shape that a server may see otherwise and still give the same log-probabilities."""


@dataclass(eq=False)
class Servers:
    """Rank 0's view of the servers: their clients, and how to get a lost one back."""

    clients: list[Client]
    files: ServerFiles | None
    """None for servers that somebody else runs: those can only be waited for."""
    shape: ModelShape
    start_timeout_s: float
    stop: StopRequest
    while_waiting: Callable[[], None] = lambda: None
    """Is called again and again meanwhile."""
    starts: Counter[int] = field(default_factory=Counter, init=False)
    """How often the launcher had started each server when it was last seen healthy."""

    def wait_until_healthy(self) -> None:
        """Returns once all servers are healthy.

        Raises Stopped where the run is asked to stop meanwhile, RunFailed where a server does not come up in time,
        UserError where it wants another key or serves another model."""
        for index, client in enumerate(self.clients):
            self._wait(
                lambda index=index: self._is_healthy(index), f"The server at {client.url} is not healthy"
            )

    def restart_lost(self, url: str) -> None:
        """Has the launcher restart the server at `url` and those that do not answer, or all if each of them seems well
        and none is named. Returns once they are back; raises what `wait_until_healthy` raises."""
        if self.files is not None:
            lost = [
                index
                for index, client in enumerate(self.clients)
                if client.url == url or not client.healthy()
            ]
            for index in lost or range(len(self.clients)):
                # lapses where the launcher has restarted it meanwhile, because it had exited
                self.files.ask_for_restart(index, self.starts[index])
                self._wait(
                    lambda index=index: self._restarted(index), "The launcher has not restarted the server"
                )
        self.wait_until_healthy()

    def _is_healthy(self, index: int) -> bool:
        if self.files is not None:
            record = self.files.read(index)
            if record is None:
                return False
            self.clients[index].move_to(record["url"])
            self.starts[index] = record["starts"]
        client = self.clients[index]
        if not client.healthy():
            # a push that failed, or a trainer that died, may have left it paused
            if self.files is None:
                with contextlib.suppress(ServerLost, ServerRefused):
                    client.resume(HEALTH_TIMEOUT_S)
            return False
        try:
            # needs the key, which /health does not
            info = client.model_info()
        except ServerLost:
            return False
        check_served_model(Path(info["model_path"]), self.shape, client.url)
        return True

    def _restarted(self, index: int) -> bool:
        record = self.files.read(index) if self.files else None
        return record is not None and record["starts"] > self.starts[index]

    def _wait(self, condition: Callable[[], bool], problem: str) -> None:
        deadline = time.monotonic() + self.start_timeout_s
        while not condition():
            if self.stop.requested:
                raise Stopped
            if time.monotonic() > deadline:
                raise RunFailed(
                    f"{problem} after server.start_timeout_s={self.start_timeout_s:g} s; look at the end of its log, "
                    "or raise that limit."
                )
            self.while_waiting()
            time.sleep(POLL_S)


def check_served_model(directory: Path, shape: ModelShape, url: str) -> None:
    """Raises UserError where the server at `url` serves a model of another shape, as far as its files can be seen
    here."""
    try:
        if not (directory / "config.json").is_file():
            return
        served, own = asdict(read_model_shape(directory)), asdict(shape)
    # it is there, but not for us
    except OSError:
        return
    for key in own:
        if key not in UNSEEN_BY_WEIGHTS and served[key] != own[key]:
            raise UserError(
                f"The server at {url} serves {directory}, whose {key} is {served[key]}, but that of model.path is "
                f"{own[key]}: start it with the model of model.path, or name another in server.urls."
            )


@dataclass(eq=False)
class Serving:
    """Rollouts from the current weights, and pushes of new ones."""

    sampler: Sampler | None
    """Rank 0's, as `servers` are; None elsewhere."""
    servers: Servers | None
    weights: WeightSync
    canary: Canary
    parallel: ParallelState
    stop: StopRequest
    _: KW_ONLY
    max_restarts: int
    message: Callable[[str], None]
    version: int = field(default=0, init=False)
    restarts_in_a_row: int = field(default=0, init=False)
    answered_before: int = field(default=0, init=False)
    """Responses that had come when a ticket was last collected, or could not be."""
    known_to_agree: bool = field(default=False, init=False)
    """Whether the canary was content since servers were last met."""
    has_released: bool = field(default=False, init=False)
    """Whether nothing may be asked of the servers before the next push."""

    def submit(
        self,
        requests: Sequence[SampleRequest],
        on_response: Callable[[Place, Rollout], None] | None = None,
        done: Mapping[Place, Rollout] | None = None,
    ) -> Ticket:
        """Starts sampling of rank 0's `requests`, which are not looked at elsewhere. `on_response` is given each
        response once, as soon as it is there, in another thread; not those that are `done` already."""
        if self.sampler is None:
            return Ticket()
        if self.has_released:
            raise RuntimeError(
                "the servers have released their memory: push before anything is asked of them"
            )
        return self.sampler.submit(requests, on_response, done)

    def asked(self, requests: Sequence[SampleRequest]) -> dict[str, str]:
        """Returns what decides, besides chance, what responses to rank 0's `requests` may be: where it is the same,
        they may be taken for each other. The names are for people. Empty where a push was given up: nothing is asked
        then, because the run is to stop."""
        if self.sampler is None or not self.weights.digest:
            return {}
        return {"the policy": self.weights.digest, "what is asked": self.sampler.digest(requests)}

    def collect(self, ticket: Ticket) -> list[list[Rollout]]:
        """Returns the ticket's rollouts on rank 0, an empty list elsewhere.

        Raises Stopped where the run was asked to stop meanwhile, RunFailed where servers are lost again and again.
        """
        while True:
            failure: ServerLost | None = None
            rollouts: list[list[Rollout]] = []
            try:
                rollouts = self.parallel.everywhere(lambda: self._collect_once(ticket))
            except ServerLost as error:
                failure = error
            # every answer shows that servers are worth another start
            answered = 0 if self.sampler is None else self.sampler.answered
            if self.parallel.any(answered > self.answered_before):
                self.restarts_in_a_row = 0
            self.answered_before = answered
            if failure is None:
                return rollouts
            self._recover(failure)
            self._push()

    def release_memory(self) -> None:
        """Has the servers release their memory, until the next push, where they share GPUs with the trainer
        (`server.release_memory`). Nothing may be asked of them meanwhile. One that is lost is waited for in that push.
        """
        self.has_released = self.weights.release is not None
        try:
            self.weights.release_servers()
        except ServerLost as error:
            self.message(f"{error}; it is met again at the next push")

    def push(self, version: int) -> dict[str, float]:
        """Pushes the current weights to all servers and has the canary check them; returns metrics.

        Gives up, without metrics, where the run is asked to stop while a server hangs or is lost. Raises RunFailed or
        UserError where the servers cannot be brought to the current weights, PolicyBroken where those are worth
        nothing."""
        self.version = version
        try:
            return self._push()
        # who is about to leave needs no server; what was learned is kept
        except Stopped:
            return {}

    @property
    def abandoned_a_call(self) -> bool:
        """Whether a call that hangs was left behind: its thread ends with the process alone."""
        return self.weights.calls.abandoned

    def leave(self) -> None:
        """Leaves the servers, of which nothing more will be asked."""
        self.weights.leave()

    def _collect_once(self, ticket: Ticket) -> list[list[Rollout]]:
        if self.sampler is None:
            return []
        if self.stop.requested:
            raise Stopped
        try:
            with self.stop.interrupting(self.sampler.abort):
                rollouts = self.sampler.collect(ticket)
        except SamplingAborted as error:
            raise Stopped from error
        for loss in ticket.losses:
            self.message(f"{loss}; the other servers have answered in its place")
        return rollouts

    def _push(self) -> dict[str, float]:
        """Raises what `_recover` raises."""
        while True:
            try:
                return self._push_once()
            except ServerLost as error:
                self._recover(error)

    def _push_once(self) -> dict[str, float]:
        began = time.monotonic()
        proven = self.weights.push(self.version)
        self.has_released = False
        pushed = time.monotonic()
        strict = not (proven and self.known_to_agree)
        gap = self.parallel.everywhere(lambda: self.canary.check(self.version, strict=strict))
        self.known_to_agree = True
        return {
            "push/proven": float(proven),
            "push/canary_gap/mean": gap.mean,
            "push/canary_gap/high": gap.high,
            "push/transfer_s": pushed - began,
            "push/canary_s": time.monotonic() - pushed,
        }

    def _recover(self, failure: ServerLost) -> None:
        """Gets lost servers back, to which the current weights are then to be pushed. Raises Stopped where the run is
        asked to stop meanwhile, RunFailed where it happens too often."""
        if self.restarts_in_a_row >= self.max_restarts:
            raise RunFailed(
                f"A server was lost {self.restarts_in_a_row + 1} times in a row ({failure}); the run stops, its last "
                "checkpoint is intact. See the end of the server's log."
            )
        self.restarts_in_a_row += 1
        what = "restart"
        if self.servers is not None and self.servers.files is None:
            what = f"waiting up to {self.servers.start_timeout_s:g} s for it to be started again"
        self.message(f"{failure}; {what} ({self.restarts_in_a_row} of {self.max_restarts})")
        self.weights.disconnect()
        self.known_to_agree = False
        self.parallel.everywhere(lambda: self.servers.restart_lost(failure.url) if self.servers else None)
