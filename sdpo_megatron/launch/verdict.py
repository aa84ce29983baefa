"""What the command says and returns, from how its ranks ended."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sdpo_megatron.errors import EXIT_FAILED, EXIT_PEER_LOST, EXIT_USER_ERROR

STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT, 128 + signal.SIGHUP)
"""Exit codes of a rank that was asked to stop, by the launcher or by somebody else, and saved."""
RESUMES = "The same command goes on from the newest checkpoint."


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How one rank ended."""

    rank: int
    exit_code: int
    """The exit code, or minus the signal that ended the rank."""
    seen_at: float
    """When the launcher saw it, in seconds; the same for all that it saw at once."""
    stated: str | None = None
    """The rank's own message about why it exits with this code. Rank 0's is on the terminal already."""
    log: str = ""
    """The path of the rank's log."""
    log_end: Sequence[str] = ()
    """The last lines of the rank's log."""


def failures(endings: Sequence[Ending], asked: int | None) -> list[Ending]:
    """Returns the endings that end the whole run. `asked` is the signal by which the launcher was asked to stop, if
    any."""
    failed = [ending for ending in endings if ending.exit_code not in (0, *STOPPED)]
    if asked is None:
        return failed
    # A rank that has no handler in place yet is ended by the launcher's SIGTERM, and its peers lose it.
    expected = [-signal.SIGTERM, EXIT_PEER_LOST] if stopped_early(endings) else [-signal.SIGTERM]
    return [ending for ending in failed if ending.exit_code not in expected]


def stopped_early(endings: Sequence[Ending]) -> bool:
    return any(ending.exit_code == -signal.SIGTERM for ending in endings)


def for_the_others(endings: Sequence[Ending], asked: int | None) -> Literal["go on", "grace", "kill"]:
    """Returns what happens to the ranks that still run: nothing, a few seconds to end and say why, or the end at
    once."""
    failed = failures(endings, asked)
    if any(ending.stated is None for ending in failed):
        return "kill"
    if failed:
        return "grace"
    # Without the one that was stopped before it could save, the others cannot go on.
    return "kill" if asked is not None and stopped_early(endings) else "go on"


def judge(endings: Sequence[Ending], asked: int | None, *, hung: bool = False) -> tuple[int, list[str]]:
    """Returns the command's exit code, and lines for standard error, where no rank runs any more; those that the
    launcher killed are not among `endings`. `hung`: whether they were asked to stop because they hung."""
    failed = failures(endings, signal.SIGTERM if hung and asked is None else asked)
    if failed:
        culprit = first_failure(failed)
        code = EXIT_USER_ERROR if culprit.exit_code == EXIT_USER_ERROR else EXIT_FAILED
        return code, report(culprit)
    if asked is not None:
        return 128 + asked, []
    # they may have finished meanwhile
    if hung and not (endings and all(ending.exit_code == 0 for ending in endings)):
        return EXIT_FAILED, [f"error: the run was ended because ranks hung. {RESUMES}"]
    return max((ending.exit_code for ending in endings), default=0), []


def first_failure(failed: Sequence[Ending]) -> Ending:
    """Returns the ending that is the cause of the others. A rank that lost a peer is none, where any other rank failed.

    It is the first to end, and of several seen at once the one that a signal ended, which the others may have lost.
    Where that one states a reason, and so does rank 0, which may have waited for it, rank 0's is taken."""
    causes = [ending for ending in failed if ending.exit_code != EXIT_PEER_LOST] or list(failed)
    first = min(causes, key=lambda ending: (ending.seen_at, ending.exit_code > 0, ending.rank))
    stated_by_0 = [ending for ending in causes if ending.rank == 0 and ending.stated is not None]
    return stated_by_0[0] if stated_by_0 and first.stated is not None else first


def report(culprit: Ending) -> list[str]:
    """Returns the lines about `culprit` that are not on the terminal already."""
    on_terminal = culprit.rank == 0
    if culprit.stated is not None:
        return [] if on_terminal else [culprit.stated]
    how, hint = exit_in_words(culprit.exit_code), ""
    if culprit.exit_code == -signal.SIGKILL:
        hint = "Where memory runs out the system does that (see dmesg). "
    line = f"error: rank {culprit.rank} {how} (log: {culprit.log}). {hint}{RESUMES}"
    return [line] if on_terminal else [line, *culprit.log_end]


def exit_in_words(exit_code: int) -> str:
    """Returns an exit code as words; it is minus the signal where one ended the process."""
    if exit_code < 0:
        return f"was ended by {signal.Signals(-exit_code).name}"
    return f"ended with exit code {exit_code}"
