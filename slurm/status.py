"""Shows how submitted runs are: python slurm/status.py RUN_DIRECTORY ..."""

import sys
from pathlib import Path

from sdpo_megatron.errors import UserError
from sdpo_megatron.job.state import in_words, number_of, queued
from sdpo_megatron.terminal import reported, script, tell


def main(argv: list[str]) -> int:
    """Returns the exit code: 0, 2 for no run that was submitted, 1 where Slurm does not answer."""
    return reported(lambda: show(argv))


def show(argv: list[str]) -> int:
    if argv in (["--help"], ["-h"]):
        tell(__doc__ or "")
        return 0
    if not argv or argv[0].startswith("-"):
        raise UserError(f"name the run directories: {script('slurm/status.py')} runs/NAME ...")
    for run in map(Path, argv):
        # what submitit keeps of an array lies beside its runs
        if run.suffix == ".sweep":
            continue
        number = number_of(run)
        tell("\n".join(in_words(run, number, queued(number))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
