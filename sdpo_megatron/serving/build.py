"""Connections to the servers, and the canary that checks them."""

from collections.abc import Callable
from pathlib import Path

from sdpo_megatron.chat import Chat
from sdpo_megatron.config import ServerSettings
from sdpo_megatron.preflight.server import read_api_key
from sdpo_megatron.records import Problem
from sdpo_megatron.rollout.client import Client
from sdpo_megatron.run_dir.directory import RunDirectory
from sdpo_megatron.run_dir.server_files import ServerFiles
from sdpo_megatron.serving.calls import Calls
from sdpo_megatron.serving.canary import Canary, rounding
from sdpo_megatron.serving.recovery import Servers
from sdpo_megatron.stopping import StopRequest
from sdpo_megatron.trainer.build import Trainer

CANARY_TOKENS = 256
"""The most tokens that the canary has: enough to pass through every weight many times, cheap beside a step."""


def connect_servers(
    settings: ServerSettings,
    timeout_s: float,
    directory: RunDirectory,
    trainer: Trainer,
    stop: StopRequest,
    while_waiting: Callable[[], None],
) -> tuple[list[Client], Servers | None]:
    """Returns rank 0's clients and servers once they are healthy, nothing elsewhere. `timeout_s` bounds a call.

    Raises Stopped where the run is asked to stop before."""
    parallel, urls, files = trainer.parallel, settings.urls, None
    key = parallel.everywhere(lambda: read_api_key(settings) if parallel.is_main else None)
    clients: list[Client] = []
    servers = None
    if parallel.is_main:
        if not urls:
            files = ServerFiles(directory.servers)
            # the launcher's server, whose address its file will give
            urls, key = [""], files.take_key(0)
        clients = [Client(url, key, timeout_s) for url in urls]
        servers = Servers(clients, files, trainer.shape, settings.start_timeout_s, stop, while_waiting)
    parallel.everywhere(lambda: servers.wait_until_healthy() if servers else None)
    return clients, servers


def build_canary(
    factor: float,
    trainer: Trainer,
    chat: Chat,
    example: Problem,
    path: Path,
    calls: Calls,
    clients: list[Client],
    message: Callable[[str], None],
) -> Canary:
    """`example` makes the canary's text; `path` keeps the noise, of which `factor` times as much is too much."""
    parallel = trainer.parallel

    def text() -> list[int]:
        if not parallel.is_main:
            return []
        ids = chat.prompt_ids(example.messages, example.tools) + chat.answer_ids(example.answer)
        return ids[-CANARY_TOKENS:]

    ids = parallel.share(parallel.everywhere(text))
    noise = rounding(ids, trainer.scorer, trainer.shape, parallel, path)
    return Canary(ids, trainer.scorer, calls, clients, noise, factor, message)
