"""File work that all ranks do together, so that a full disk on one of them ends all of them in the same line."""

import re
from collections.abc import Callable
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from sdpo_megatron.errors import RunFailed
from sdpo_megatron.trainer.parallel import ParallelState, Result


def together(parallel: ParallelState, what: str, work: Callable[[], Result]) -> Result:
    """Does `work` on every rank, as `ParallelState.everywhere` does; where the file system fails, all raise
    RunFailed."""

    def on_disk() -> Result:
        try:
            return work()
        except (OSError, RuntimeError) as error:
            problem = problem_of_disk(error)
            if not problem:
                raise
            raise RunFailed(_not_done(what, parallel.rank, problem)) from error

    return parallel.everywhere(on_disk)


def write_failed(path: Path, error: CheckpointException) -> BaseException:
    """Returns the first failure among the ranks, if it is the file system's; any other is a bug and stays what it
    is."""
    rank, (cause, _) = min(error.failures.items())
    problem = problem_of_disk(cause)
    return RunFailed(_not_done(f"write {path}", rank, problem)) if problem else error


def _not_done(what: str, rank: int, problem: str) -> str:
    return (
        f"Could not {what} on rank {rank}: {problem}. Free space there and start the same command again: "
        "older checkpoints are intact."
    )


def problem_of_disk(error: BaseException) -> str:
    """Returns the problem in one line; empty where the error is not the file system's."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # torch writes in C++, which does not say more
    if isinstance(error, RuntimeError) and re.search(
        "inline_container|iostream error|PytorchStreamWriter", str(error)
    ):
        return "the file system does not take all of a file"
    return ""
