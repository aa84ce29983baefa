"""One rank's process: checks, builds its run, trains, and turns errors into one line and an exit code."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from sdpo_megatron.errors import RunFailed, UserError
from sdpo_megatron.preflight import claim_run_directory, preflight
from sdpo_megatron.stopping import install_stop_signals

EXIT_FAILED, EXIT_USER_ERROR = 1, 2


def run_rank(argv: Sequence[str], train: Callable[[Any], None]) -> int:
    """0: finished or stopped with its state saved; 1: the run cannot go on; 2: the user's to mend."""
    stop = install_stop_signals()
    try:
        checked = preflight(argv, world_size=int(os.environ["WORLD_SIZE"]))
        directory = claim_run_directory(checked, int(os.environ["RANK"]))
        from sdpo_megatron.build import build_run  # torch and megatron only once everything is checked

        run = build_run(checked, directory, stop)
        try:
            train(run)
        finally:
            run.log.close()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except RunFailed as error:
        print(f"stopped: {error}", file=sys.stderr)
        return EXIT_FAILED
    return 0
