"""Several ranks for a test: a pool of processes that import megatron-core once and serve many tests.

    results = run_ranks(3, "tests.distributed.learning:compare", layout, directory)

calls that function in three processes, each a gloo rank of one process group, and returns what each of them
returned (JSON), by rank. The function is named, not handed over, so that the process of the tests does not
import megatron-core.
"""

import gc
import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import socket
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

STARTING_S = 300.0
"""Longest wait for a call, added to the caller's, while processes start: 7 s each on an idle machine."""


class RankError(AssertionError):
    """A rank raised; the message is its traceback."""


class _Pool:
    def __init__(self) -> None:
        self.workers: list[tuple[Any, Connection]] = []

    def grow(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        while len(self.workers) < count:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.workers.append((process, ours))

    def stop(self) -> None:
        for process, connection in self.workers:
            connection.close()
            process.kill()
        for process, _ in self.workers:
            process.join()
        self.workers.clear()


_pool = _Pool()


def run_ranks(count: int, function: str, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """Results of `module:function`(*args) on ranks 0 to `count` - 1; `args` are JSON.

    Raises RankError with the traceback of the first rank that raised, or where a rank ended or did not answer in
    time; such a pool is thrown away.
    """
    starting = len(_pool.workers) < count
    _pool.grow(count)
    port = _free_port()
    for rank in range(count):
        _pool.workers[rank][1].send_bytes(json.dumps([function, args, rank, count, port]).encode())
    deadline = time.monotonic() + timeout_s + (STARTING_S if starting else 0.0)
    try:
        answers = _answers(count, deadline)
    except RankError:
        _pool.stop()
        raise
    return [answers[rank]["result"] for rank in range(count)]


def _answers(count: int, deadline: float) -> dict[int, dict[str, Any]]:
    connections = {_pool.workers[rank][1]: rank for rank in range(count)}
    answers: dict[int, dict[str, Any]] = {}
    while connections:
        ready = multiprocessing.connection.wait(list(connections), max(deadline - time.monotonic(), 0.0))
        if not ready:
            raise RankError(f"No answer in time from ranks {sorted(connections.values())}.")
        for connection in ready:
            rank = connections.pop(connection)  # type: ignore[arg-type]
            try:
                answers[rank] = json.loads(connection.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                raise RankError(f"Rank {rank} ended without an answer.") from None
            if "error" in answers[rank]:
                raise RankError(f"Rank {rank}:\n{answers[rank]['error']}")
    return answers


def stop_ranks() -> None:
    """Ends the processes; the next `run_ranks` starts new ones."""
    _pool.stop()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _serve(connection: Connection) -> None:
    """One process of the pool: calls what it is told to, until the tests hang up."""
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        name, args, rank, count, port = json.loads(message)
        try:
            answer = {"result": _call(name, args, rank, count, port)}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        connection.send_bytes(json.dumps(answer).encode())


def _call(name: str, args: list[Any], rank: int, count: int, port: int) -> Any:
    from sdpo_megatron.trainer.parallel import shut_down

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)(*args)
    finally:
        shut_down()
        _release_groups()


def _release_groups() -> None:
    """Lets go of what still refers to process groups: each keeps threads for as long as it lives.

    megatron's data-parallel wrapper and the autograd hooks that it registers keep each other alive, where Python's
    collector does not look.
    """
    from megatron.core.distributed import DistributedDataParallel

    for thing in gc.get_objects():
        if type(thing) is DistributedDataParallel:
            thing.grad_accs.clear()
    gc.collect()
