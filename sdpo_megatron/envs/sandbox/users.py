"""Whose processes programs are: root's would have root's rights, and count against no limit."""

import os
import secrets
from pathlib import Path

CAP_SETUID = 7
FIRST_USER = 1 << 30
"""Users from here on are nobody's, so that no other process is a program's kin."""


def another_user() -> int:
    """Returns a user of whom there is no other process, or 0 where this process cannot become another."""
    if os.geteuid() != 0:
        return 0
    capabilities = int(Path("/proc/self/status").read_text().partition("CapEff:")[2].split()[0], 16)
    ranges = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    users = FIRST_USER, FIRST_USER * 2 - 1
    known = any(int(first) <= users[0] and users[1] < int(first) + int(n) for first, _, n in ranges)
    if not capabilities >> CAP_SETUID & 1 or not known:
        return 0
    return FIRST_USER + secrets.randbelow(FIRST_USER)
