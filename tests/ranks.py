"""Several ranks for a test, as processes that are forked from one which has imported megatron-core already.

    results = run_ranks(3, "tests.distributed.learning:learn", directory, samples, out, layout, options)

calls that function in three new processes, each a gloo rank of one process group, and returns what each of them
returned (JSON), by rank. The function is named, not handed over, so that the process of the tests does not import
megatron-core. A process serves one call: gloo's threads live as long as anything refers to a process group.
"""

import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

from sdpo_megatron.launch.server import free_port

STARTING_S = 180.0
"""Longest wait for the first call, added to the caller's, while megatron-core is imported: 8 s on an idle machine."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["sdpo_megatron.trainer.checkpoint", "sdpo_megatron.trainer.export", "sdpo_megatron.trainer.step"]
)
_started = False


class RankError(AssertionError):
    """A rank raised; the message is its traceback."""


def run_ranks(count: int, function: str, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """Results of `module:function`(*args) on ranks 0 to `count` - 1; `args` are JSON.

    Raises RankError with the traceback of the first rank that raised, or where a rank ended or did not answer in
    time; the others are killed.
    """
    global _started
    deadline = time.monotonic() + timeout_s + (0.0 if _started else STARTING_S)
    _started = True
    port = free_port("127.0.0.1")
    call = json.dumps([function, args])
    connections: dict[Any, int] = {}
    processes = []
    for rank in range(count):
        ours, theirs = _context.Pipe()
        process = _context.Process(target=_serve, args=(theirs, call, rank, count, port), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        connections[ours] = rank
    try:
        answers = _answers(dict(connections), deadline)
    finally:
        for connection in connections:
            connection.close()
        for process in processes:
            process.kill()
            process.join()
    return [answers[rank] for rank in range(count)]


def _answers(connections: dict[Any, int], deadline: float) -> dict[int, Any]:
    answers: dict[int, Any] = {}
    while connections:
        ready = multiprocessing.connection.wait(list(connections), max(deadline - time.monotonic(), 0.0))
        if not ready:
            raise RankError(f"No answer in time from ranks {sorted(connections.values())}.")
        for connection in ready:
            rank = connections.pop(connection)
            try:
                answer = json.loads(connection.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                raise RankError(f"Rank {rank} ended without an answer.") from None
            if "error" in answer:
                raise RankError(f"Rank {rank}:\n{answer['error']}")
            answers[rank] = answer["result"]
    return answers


def _serve(connection: Connection, call: str, rank: int, count: int, port: int) -> None:
    """One rank."""
    threading.Thread(target=_end_with_parent, args=(connection,), daemon=True).start()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        answer = {"result": _call(call)}
    except BaseException:
        answer = {"error": traceback.format_exc()}
    connection.send_bytes(json.dumps(answer).encode())
    # others may still need this rank's part of a connection: the parent ends all of them together
    threading.Event().wait()


def _end_with_parent(connection: Connection) -> None:
    """The process of the tests never writes: what can be read is its end."""
    multiprocessing.connection.wait([connection])
    os._exit(1)


def _call(call: str) -> Any:
    import torch

    torch.set_num_threads(1)
    name, args = json.loads(call)
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)(*args)
