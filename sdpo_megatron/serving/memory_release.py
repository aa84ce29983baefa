"""Servers that share their GPUs with the trainer in turn: from the end of a rollout to the next push they give their
memory back.

SGLang's memory saver unmaps what it calls `weights` and `kv_cache`, and maps it again without what was in it. So a push
always follows, and the cache is empty by then. In SGLang 0.5.23 (managers/scheduler_components/weight_updater.py) two
things end a server: a release while something runs, which it also takes a batch for that is done but not yet flushed;
and taking back what was not released. A server that is lost while it rests is started anew as ever, and has its memory
then, beside the trainer's. On CPUs there is no memory saver: there only the order of the calls is tested. It
has not run on GPUs yet.
"""

import time
from collections import defaultdict

import torch

from sdpo_megatron.errors import ServerLost, ServerRefused
from sdpo_megatron.rollout.client import Client
from sdpo_megatron.rollout.weight_mark import WeightMark

CACHE, WEIGHTS = "kv_cache", "weights"
IDLE_S = 30.0
"""How long a paused server may take until nothing runs on it: all responses of the step are there."""
POLL_S = 0.1


class MemoryRelease:
    """Has servers release their memory and take it back. All ranks have one, though rank 0 alone asks servers."""

    def __init__(self, mark: WeightMark, idle_s: float = IDLE_S):
        self._mark = mark
        self._idle_s = idle_s
        self._released: defaultdict[Client, set[str]] = defaultdict(set)
        """What each server has not taken back yet."""

    def begin(self, client: Client) -> None:
        """Returns once a server, on which nothing is under way, is paused and has released its memory. Raises
        ServerLost."""
        client.pause()
        self._flush(client)
        client.release_memory([CACHE, WEIGHTS])
        self._released[client] = {CACHE, WEIGHTS}

    def take_back_weights(self, client: Client) -> None:
        """Has a server take back the memory of its weights, if it has released it: before they are pushed. Raises
        ServerLost."""
        # one that was started anew has all of its memory
        if self._released[client]:
            version = client.model_info()["weight_version"]
            try:
                self._mark.read(version, client.url)
            except ServerLost:
                self._released[client].clear()
        self._take_back(client, WEIGHTS)

    def take_back_cache(self, client: Client) -> None:
        """Has a server take back the memory of its cache, likewise: before it goes on. Raises ServerLost."""
        self._take_back(client, CACHE)

    def _take_back(self, client: Client, what: str) -> None:
        if what in self._released[client]:
            client.resume_memory([what])
            self._released[client].discard(what)

    def _flush(self, client: Client) -> None:
        """Waits until the server is idle, which is when it agrees to a flush."""
        deadline = time.monotonic() + self._idle_s
        while True:
            try:
                return client.flush_cache()
            except ServerRefused as error:
                if time.monotonic() > deadline:
                    raise ServerLost(
                        f"the server at {client.url} was not idle {self._idle_s:g} s after it was paused, and so "
                        f"cannot release its memory: {error}",
                        client.url,
                    ) from error
            time.sleep(POLL_S)


def give_unused_memory_back() -> None:
    """Has this process return to its GPU what its last step needed, for the servers to take."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
