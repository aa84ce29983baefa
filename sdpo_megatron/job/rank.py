"""One rank of a job: python -m sdpo_megatron.job.rank BEGUN ATTEMPT MASTER PORT GPUS, and the arguments of
sdpo_megatron.train."""

import os
import signal
import sys
from pathlib import Path

from sdpo_megatron.config import load_config
from sdpo_megatron.files import expand_user
from sdpo_megatron.job.caches import place_caches
from sdpo_megatron.job.fence import end_with_attempt
from sdpo_megatron.job.task import device_variables, rank_variables
from sdpo_megatron.preflight.checked import parse_arguments
from sdpo_megatron.run_dir.phases import STACKS_ASKED_BY
from sdpo_megatron.terminal import reported


def main(argv: list[str]) -> int:
    begun, number, *argv = argv
    # until there is a handler that writes what this rank is at
    signal.signal(STACKS_ASKED_BY, signal.SIG_IGN)
    end_with_attempt(Path(begun), int(number))
    return reported(lambda: run_task(int(number), *argv[:3], arguments=argv[3:]))


def run_task(attempt: int, master: str, port: str, gpus: str, *, arguments: list[str]) -> int:
    os.environ |= rank_variables(os.environ, master, port) | device_variables(os.environ, gpus)
    if gpus == "-":
        # threads that wait by spinning starve the other ranks
        os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    settings = parse_arguments(arguments)
    run = load_config(settings.files, settings.overrides)[0].run
    directory = expand_user(run.dir, "run.dir") / run.name
    caches = place_caches("trainer", attempt, directory, sys.executable, os.environ, on_gpus=gpus != "-")
    kept = caches if os.environ["RANK"] == "0" else None
    if kept is not None:
        kept.keep_from_now_on()
    from sdpo_megatron.train import main as train

    code = train(arguments)
    # one that was asked to stop has no time for more than saving
    if kept is not None and code == 0:
        kept.keep()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
