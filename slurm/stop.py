"""Has a submitted run save and end: python slurm/stop.py RUN_DIRECTORY"""

import sys
from pathlib import Path

from sdpo_megatron.errors import UserError
from sdpo_megatron.job.slurm import run_command
from sdpo_megatron.job.state import number_of, queued
from sdpo_megatron.job.this_machine import LOCAL, stop_here
from sdpo_megatron.terminal import reported, tell


def main(argv: list[str]) -> int:
    """Returns the exit code: 0, 2 for no run that was submitted, 1 where Slurm does not answer."""
    return reported(lambda: stop(argv))


def stop(argv: list[str]) -> int:
    if len(argv) != 1 or argv[0].startswith("-"):
        raise UserError("name the run directory: python slurm/stop.py runs/NAME")
    run = Path(argv[0])
    number = number_of(run)
    queue = queued(number)
    if queue is None:
        tell(f"Job {number} of {run} has ended already.")
    elif queue.state == "PENDING":
        # there is nothing to save
        run_command(["scancel", number])
        tell(f"Job {number} of {run} was waiting, and is cancelled.")
    else:
        ask(number)
        tell(f"Job {number} of {run} saves and ends; python slurm/status.py {run} shows when.")
    return 0


def ask(number: str) -> None:
    """Asks a job that runs to save and end."""
    if not number.startswith(LOCAL):
        run_command(["scancel", "--batch", "--signal=TERM", number])
    else:
        stop_here(number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
