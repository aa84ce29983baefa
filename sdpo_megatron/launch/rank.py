"""One rank's process: checks, builds its run, trains, and turns errors into one message and an exit code."""

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sdpo_megatron.errors import EXIT_FAILED, EXIT_PEER_LOST, EXIT_USER_ERROR, PeerLost, RunFailed, UserError
from sdpo_megatron.preflight.checked import Checked, claim_run_directory, preflight
from sdpo_megatron.run_dir.directory import parent_holds
from sdpo_megatron.run_dir.phases import write_ending
from sdpo_megatron.stopping import Stopped, install_stop_signals
from sdpo_megatron.terminal import tell

PEER_LOST = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
"""Words of what torch.distributed raises on the ranks that are left when another one ends."""
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def run_rank(argv: Sequence[str], train: Callable[[Any], bool]) -> int:
    """Runs one rank and returns its exit code. 0: finished; 128 + signal: stopped, with its state saved; 1: the run
    cannot go on; 2: the user's to mend; 3: another rank ended."""
    runs: list[Any] = []
    code = _run_rank(argv, train, runs)
    if any(run.serving.abandoned_a_call for run in runs):
        # the threads of what hangs would hold the process until their own limits
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
    return code


def _run_rank(argv: Sequence[str], train: Callable[[Any], bool], runs: list[Any]) -> int:
    """`runs` is given the run as soon as there is one."""
    stop = install_stop_signals()
    ending_file: Path | None = None
    is_shown = True
    try:
        world_size, rank = check_rank_variables()
        checked = preflight(argv, world_size=world_size, rank=rank)
        if checked.only_check:
            return 0
        # only the launcher reads it, and without the launcher the directory may be another run's
        if parent_holds(checked.directory.path):
            ending_file = checked.directory.ending(rank)
        else:
            check_without_launcher(checked)
        if checked.device == "cuda":
            rank_variable("LOCAL_RANK")
        directory = claim_run_directory(checked, rank)
        # torch and megatron only once everything is checked
        from sdpo_megatron.build import build_run

        run = build_run(checked, directory, stop, rank)
        runs.append(run)
        try:
            finished = train(run)
            run.serving.leave()
        finally:
            run.log.close()
        if finished:
            return 0
        # another rank may have had the signal
        code, is_shown = 128 + (stop.signal or signal.SIGTERM), run.parallel.is_main
        message = (
            f"stopped: asked to after {run.completed} of {run.steps} steps, which are saved. The same command goes on "
            "from there."
        )
    except Exception as error:
        ending = ending_of(error, stop.signal)
        if ending is None:
            raise
        code, message = ending
    if ending_file is not None:
        # where the disk is full, the launcher has the end of the log to show
        with contextlib.suppress(OSError):
            write_ending(ending_file, code, message)
    if is_shown:
        tell(message, sys.stderr)
    return code


def ending_of(error: Exception, asked: int | None) -> tuple[int, str] | None:
    """Returns exit code and message for an `error` that ends a rank; None for a bug, which its traceback tells best.

    `asked` is the signal by which this rank was asked to stop, if any."""
    if isinstance(error, Stopped):
        return 128 + (asked or signal.SIGTERM), "stopped: asked to before the first step; nothing is lost."
    if isinstance(error, UserError):
        return EXIT_USER_ERROR, f"error: {error}"
    if isinstance(error, RunFailed):
        return EXIT_PEER_LOST if isinstance(error, PeerLost) else EXIT_FAILED, f"stopped: {error}"
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in PEER_LOST):
        first_line = str(error).splitlines()[0]
        return EXIT_PEER_LOST, f"stopped: another rank ended ({first_line}); its own last lines say why."
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        where = f" to write {error.filename}" if error.filename else ""
        return EXIT_FAILED, (
            f"stopped: the disk failed{where}: {error.strerror}. Free space and start the same command again: the "
            "last checkpoint is intact."
        )
    return None


def check_rank_variables() -> tuple[int, int]:
    """Returns world size and rank. Raises UserError where what starts ranks has left something out."""
    world_size, rank = rank_variable("WORLD_SIZE"), rank_variable("RANK")
    if rank >= world_size:
        raise UserError(f"RANK is {rank}, but WORLD_SIZE={world_size}; ranks count from 0 to WORLD_SIZE - 1.")
    return world_size, rank


def check_without_launcher(checked: Checked) -> None:
    """Raises UserError where what starts ranks on several machines does not say where they meet, and where a server is
    to be started, which only the launcher does."""
    rank_variable("MASTER_PORT")
    if not os.environ.get("MASTER_ADDR"):
        raise UserError("MASTER_ADDR is not set; give the address of rank 0's machine, as torchrun does.")
    if not checked.config.server.urls:
        raise UserError(
            "ranks that torchrun or srun starts use servers that run already; give them as server.urls=[http://HOST:PORT]."
        )


def rank_variable(name: str) -> int:
    """Returns the number in the variable `name`, as torchrun sets it. Raises UserError where there is none."""
    text = os.environ.get(name, "")
    if not text.isdigit():
        raise UserError(
            f"RANK is set, so this is one rank, but {name} is '{text}': start it with torchrun, or unset RANK to have "
            "everything started here."
        )
    return int(text)
