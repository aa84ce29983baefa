"""Kills process groups as soon as the process at the other end of its standard input is gone.

    python kill_orphans.py          lines on stdin: "+GROUP" watch it, "-GROUP" watch it no longer

The death signal of launch/die_with_parent.py reaches a child, but not the child's children. A script of its
own (standard library only) that is cheap to keep waiting.
"""

import os
import signal
import sys


def main() -> None:
    groups: set[int] = set()
    for line in sys.stdin:
        group = int(line[1:])
        if line[0] == "+":
            groups.add(group)
        else:
            groups.discard(group)
    for group in groups:
        try:
            os.killpg(group, signal.SIGKILL)
        # all of it has ended
        except ProcessLookupError:
            continue


if __name__ == "__main__":
    main()
