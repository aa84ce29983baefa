"""Writes the report of a run, which a browser opens as a file:

    python -m sdpo_megatron.report runs/demo_cpu [--out DIR]

Works while the run goes on, and after it crashed. What is there already is kept: the same command later adds the new
steps.
"""

import argparse
import sys
from pathlib import Path

from sdpo_megatron.report.site import write_report
from sdpo_megatron.terminal import escape_what_cannot_be_shown, reported, tell


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sdpo_megatron.report", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("run", type=Path, help="a run directory, such as runs/demo_cpu")
    parser.add_argument(
        "--out", type=Path, help="where the report goes; by default report/ in the run directory"
    )
    arguments = parser.parse_args()
    escape_what_cannot_be_shown()

    def write() -> int:
        index = write_report(arguments.run, arguments.out)
        tell(f"Report: {index}\n{index.resolve().as_uri()}")
        return 0

    return reported(write)


if __name__ == "__main__":
    sys.exit(main())
