"""One rank's process: checks, builds its run, trains, and turns errors into one line and an exit code."""

import errno
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from sdpo_megatron.errors import RunFailed, UserError
from sdpo_megatron.preflight import Checked, claim_run_directory, preflight
from sdpo_megatron.rollout.client import ServerRefused
from sdpo_megatron.run_dir import lock_owner
from sdpo_megatron.stopping import install_stop_signals
from sdpo_megatron.terminal import tell

EXIT_FAILED, EXIT_USER_ERROR = 1, 2
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def run_rank(argv: Sequence[str], train: Callable[[Any], None]) -> int:
    """0: finished or stopped with its state saved; 1: the run cannot go on; 2: the user's to mend."""
    stop = install_stop_signals()
    try:
        checked = preflight(argv, world_size=rank_variable("WORLD_SIZE"))
        check_servers(checked)
        directory = claim_run_directory(checked, rank_variable("RANK"))
        from sdpo_megatron.build import build_run  # torch and megatron only once everything is checked

        run = build_run(checked, directory, stop)
        try:
            train(run)
            run.serving.leave()
        finally:
            run.log.close()
    except UserError as error:
        tell(f"error: {error}", sys.stderr)
        return EXIT_USER_ERROR
    except (RunFailed, ServerRefused) as error:
        tell(f"stopped: {error}", sys.stderr)
        return EXIT_FAILED
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where = f" to write {error.filename}" if error.filename else ""
        tell(
            f"stopped: the disk failed{where}: {error.strerror}. Free space and start the same command again: the "
            "last checkpoint is intact.",
            sys.stderr,
        )
        return EXIT_FAILED
    return 0


def rank_variable(name: str) -> int:
    """As torchrun sets it."""
    text = os.environ.get(name, "")
    if not text.isdigit():
        raise UserError(
            f"RANK is set, so this is one rank, but {name} is '{text}': start it with torchrun, or unset RANK to have "
            "everything started here."
        )
    return int(text)


def check_servers(checked: Checked) -> None:
    """Only the launcher starts servers."""
    launched = lock_owner(checked.directory.path) == os.getppid()
    if not checked.config.server.urls and not launched:
        raise UserError(
            "ranks that torchrun or srun starts use servers that run already; give them as server.urls=[http://HOST:PORT]."
        )
