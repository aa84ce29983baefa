"""How ranks ended -> what happens to the others, what the command says and what it returns."""

import signal

import pytest

from sdpo_megatron.launch.verdict import RESUMES, Ending, for_the_others, judge

TERM, INT = signal.SIGTERM, signal.SIGINT
KILLED = -signal.SIGKILL


def ended(rank: int, exit_code: int, stated: str | None = None, at: float = 0.0) -> Ending:
    return Ending(
        rank=rank, exit_code=exit_code, seen_at=at, stated=stated, log=f"log{rank}", log_end=("odd",)
    )


def crash(rank: int, how: str) -> str:
    hint = "Where memory runs out the system does that (see dmesg). " if "SIGKILL" in how else ""
    return f"error: rank {rank} {how} (log: log{rank}). {hint}{RESUMES}"


TABLE = [
    ("nothing yet", [], None, "go on", 0, []),
    ("finished", [ended(0, 0), ended(1, 0)], None, "go on", 0, []),
    ("stopped by somebody else", [ended(0, 143), ended(1, 0)], None, "go on", 143, []),
    ("asked to stop, saved", [ended(0, 143), ended(1, 143)], INT, "go on", 130, []),
    ("asked to stop, finished meanwhile", [ended(0, 0), ended(1, 0)], TERM, "go on", 143, []),
    ("asked to stop before it could save", [ended(0, -TERM)], TERM, "kill", 143, []),
    ("and its peer lost it", [ended(1, 3, "lost"), ended(0, -TERM)], INT, "kill", 130, []),
    ("asked to stop, could not save", [ended(0, 1, "disk"), ended(1, 143)], TERM, "grace", 1, []),
    ("asked to stop, one lost a peer", [ended(1, 3, "lost")], TERM, "grace", 1, ["lost"]),
    ("killed", [ended(1, KILLED)], None, "kill", 1, [crash(1, "was ended by SIGKILL"), "odd"]),
    ("terminated by somebody else", [ended(0, -TERM)], None, "kill", 1, [crash(0, "was ended by SIGTERM")]),
    ("a bug", [ended(1, 1)], None, "kill", 1, [crash(1, "ended with exit code 1"), "odd"]),
    ("a bug of rank 0, on the terminal", [ended(0, 1)], None, "kill", 1, [crash(0, "ended with exit code 1")]),
    ("a reason", [ended(1, 1, "nan")], None, "grace", 1, ["nan"]),
    ("rank 0's reason, on the terminal", [ended(0, 1, "nan")], None, "grace", 1, []),
    ("the user's", [ended(1, 2, "mend this")], None, "grace", 2, ["mend this"]),
    ("all fail alike, rank 1 first", [ended(1, 2, "a"), ended(0, 2, "a", at=1.0)], None, "grace", 2, []),
    ("rank 0 fails otherwise and has said so", [ended(1, 1, "a"), ended(0, 2, "b", at=1.0)], None, "grace", 2, []),
    ("rank 0 only lost the peer", [ended(0, 3, "lost"), ended(1, 2, "a", at=1.0)], None, "grace", 2, ["a"]),
    ("only losses", [ended(1, 3, "lost"), ended(0, 0)], None, "grace", 1, ["lost"]),
    ("a loss, then the bug that caused it", [ended(0, 3, "lost"), ended(1, 1, at=1.0)], None, "kill", 1,
     [crash(1, "ended with exit code 1"), "odd"]),
    ("a reason, then what it caused", [ended(1, 1, "nan"), ended(0, 1, at=1.0)], None, "kill", 1, ["nan"]),
    ("a death and a bug that it caused, seen at once", [ended(0, 1), ended(2, KILLED)], None, "kill", 1,
     [crash(2, "was ended by SIGKILL"), "odd"]),
    ("a bug and a later death", [ended(1, 1), ended(2, KILLED, at=1.0)], None, "kill", 1,
     [crash(1, "ended with exit code 1"), "odd"]),
    ("two bugs at once", [ended(2, 5), ended(1, 7)], None, "kill", 1, [crash(1, "ended with exit code 7"), "odd"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("endings", "asked", "others", "code", "messages"),
    [row[1:] for row in TABLE],
    ids=[row[0] for row in TABLE],
)
def test_the_verdict(endings, asked, others, code, messages):
    assert for_the_others(endings, asked) == others
    assert judge(endings, asked) == (code, messages)
