"""Has a submitted run save and end: python slurm/stop.py RUN_DIRECTORY"""

import sys
from pathlib import Path

from sdpo_megatron.errors import RunFailed, UserError
from sdpo_megatron.job.description import JobDirectory, ask_to_stop
from sdpo_megatron.job.slurm import is_unknown, run_command
from sdpo_megatron.job.state import number_of, queued
from sdpo_megatron.job.this_machine import LOCAL, stop_here
from sdpo_megatron.terminal import reported, script, tell


def main(argv: list[str]) -> int:
    """Returns the exit code: 0, 2 for no run that was submitted, 1 where Slurm does not answer."""
    return reported(lambda: stop(argv))


def stop(argv: list[str]) -> int:
    if argv in (["--help"], ["-h"]):
        tell(__doc__ or "")
        return 0
    if len(argv) != 1 or argv[0].startswith("-"):
        raise UserError(f"name the run directory: {script('slurm/stop.py')} runs/NAME")
    run = Path(argv[0])
    number = number_of(run)
    queue = queued(number)
    try:
        done = "has ended already" if queue is None else end(run, number, queue.state)
    except RunFailed as error:
        # it ended meanwhile
        if not is_unknown(error):
            raise
        done = "has ended already"
    tell(f"Job {number} of {run} {done}; {script('slurm/status.py', run)} shows how it is.")
    return 0


def end(run: Path, number: str, state: str) -> str:
    """Has a job end, and returns what becomes of it."""
    if state == "PENDING":
        # there is nothing to save
        run_command(["scancel", number])
        return "was waiting, and is cancelled"
    ask_to_stop(JobDirectory(run / "job"), number)
    if number.startswith(LOCAL):
        stop_here(number)
    else:
        run_command(["scancel", "--batch", "--signal=TERM", number])
    return "saves and ends"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
