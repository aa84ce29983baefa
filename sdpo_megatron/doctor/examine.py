"""Runs checks, each in a process of its own: one that raises, crashes or hangs costs its own lines alone."""

import os
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from sdpo_megatron.doctor.findings import Finding, failure, from_json, to_json
from sdpo_megatron.envs.grading.host import end_with_parent

TOTAL_S = 110.0
"""Seconds that all checks together may take."""
TIDY_S = 3.0
"""Seconds that a check may take to remove what it made, once it is stopped."""


@dataclass(frozen=True, kw_only=True)
class Check:
    name: str
    """What a finding is called where `look` makes none."""
    look: Callable[[], list[Finding]]
    limit_s: float = 10.0
    if_it_hangs: str = "see what this machine waits for (dmesg), and run this again"


def examine(checks: Sequence[Check], total_s: float = TOTAL_S) -> list[Finding]:
    """Returns what the checks found, one after another, in their order. To be called from a process of one thread."""
    end = time.monotonic() + total_s
    findings: list[Finding] = []
    for check in checks:
        findings += _examined(check, min(check.limit_s, end - time.monotonic()))
    return findings


def _examined(check: Check, limit_s: float) -> list[Finding]:
    if limit_s <= 0:
        return [failure(check.name, "not looked at: the checks before took too long", "mend those first")]
    # a file, and not a pipe: it takes an answer of any size from a process that may be gone by then
    answer = os.memfd_create("answer")
    us = os.getpid()
    child = os.fork()
    if child == 0:
        _look(check, answer, us)
    ended = os.pidfd_open(child)
    in_time, code = False, None
    try:
        in_time = _wait(ended, limit_s)
    finally:
        code = _end(child, ended)
        os.close(ended)
        with os.fdopen(answer, "rb") as file:
            file.seek(0)
            said = file.read()
    if not in_time:
        return [failure(check.name, f"no answer within {limit_s:.3g} s", check.if_it_hangs)]
    if code:
        by = signal.Signals(-code).name if code < 0 else f"code {code}"
        todo = "see dmesg for why: a broken library, or memory that ran out"
        return [failure(check.name, f"the check's process crashed ({by})", todo)]
    return from_json(said)


def _look(check: Check, answer: int, parent: int) -> NoReturn:
    """Is the child's whole life. A stop is an exception, so that what the check made is removed."""
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        end_with_parent(parent, signal.SIGTERM)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nowhere, stream)
        try:
            findings = check.look()
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            findings = [failure(check.name, f"the check failed with {what}", "mend that, and run this again")]
        os.write(answer, to_json(findings).encode())
        os._exit(0)
    finally:
        # whatever it is, nothing above this frame is the child's
        os._exit(1)


def _end(child: int, ended: int) -> int | None:
    """Ends a check and what it started; its process id is its own until it is waited for here. Returns its exit code,
    minus the signal that ended it; None where it cannot be ended."""
    if not _wait(ended, 0):
        os.kill(child, signal.SIGTERM)
        _wait(ended, TIDY_S)
    for kill in (os.kill, os.killpg):
        # the group is there as soon as the child has made it
        with suppress(ProcessLookupError):
            kill(child, signal.SIGKILL)
    # one that waits for a file system that is gone cannot be killed, and is left to its end
    if not _wait(ended, TIDY_S):
        return None
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _wait(ended: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    return bool(poll.poll(seconds * 1000))
