"""Which rank keeps the others waiting, since when; and whether the run is to be ended for it.

A rank whose process is stopped, by SIGSTOP or a debugger, hangs. So do all, where none has got on for longer than its
phase may take: the one to blame is then the one that does not say what it is at, while others do, or else the one that
waits for no other, by its stack. Processes on other machines are known by their files alone."""

import contextlib
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise

from sdpo_megatron.files import write_atomically
from sdpo_megatron.launch.processes import is_stopped
from sdpo_megatron.run_dir.directory import RunDirectory
from sdpo_megatron.run_dir.phases import STACKS_ASKED_BY, START, Phase, read_phase

LOOK_S = 1.0
STOPPED_S = 5.0
"""How long a process must be stopped: what looks into one does so for a moment."""
SLOW_S = 60.0
SLOW_FACTOR = 5.0
"""Without progress a phase may take this many times the longest that it took so far, and at least SLOW_S."""
FIRST_TIME_S = 900.0
"""What a phase may take the first time, when models are loaded and kernels compiled."""
STACKS_S = 2.0
"""How long ranks have to write what they are at."""
THREAD = re.compile(r"(?m)^(?:Current thread|Thread) .*$")
WAITING = re.compile(
    r'"[^"]*/(?:torch/distributed/|megatron/core/pipeline_parallel/p2p)[^"]*", line \d+ in (\w+)'
)


@dataclass(frozen=True)
class Watched:
    """A rank that runs."""

    place: str
    """In words: "process 123", "on n2"."""
    pid: int | None = None
    """None on another machine."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What was seen of a rank; times in seconds since 1970."""

    rank: int
    watched: Watched
    phase: Phase
    """The start, before it has written one."""
    has_written: bool
    """Whether it has: then it has a handler for the signal that asks for stacks."""
    stopped_since: float | None

    @property
    def limit_s(self) -> float:
        """How long it may make no progress."""
        longest = self.phase.longest_s
        return FIRST_TIME_S if longest is None else max(SLOW_S, SLOW_FACTOR * longest)

    @property
    def is_asked(self) -> bool:
        """Whether it can be asked for its stacks."""
        return self.has_written and self.stopped_since is None

    def where(self) -> str:
        """Returns what it does, in words."""
        if self.phase.step is None:
            return f"in phase {START}"
        return f"in phase {self.phase.phase} of step {self.phase.step}"


def stopped_ranks(seen: list[Seen], now: float) -> list[Seen]:
    """Returns the ranks whose process was stopped some time ago."""
    return [one for one in seen if one.stopped_since is not None and now - one.stopped_since >= STOPPED_S]


def make_no_progress(seen: list[Seen], now: float) -> bool:
    """Whether no rank has got on for longer than any of them may take."""
    return bool(seen) and now - max(one.phase.progress for one in seen) > max(one.limit_s for one in seen)


def waits_in(stacks: str) -> str | None:
    """Returns the call by which a rank waits for others, None where it does not. `stacks` is what faulthandler wrote:
    of each thread the innermost call first."""
    for thread in THREAD.split(stacks):
        # what is behind the wrappers of a collective is at the top
        for line in thread.strip().splitlines()[:4]:
            if found := WAITING.search(line):
                return found[1]
    return None


def ask_for_stacks(seen: Collection[Seen]) -> None:
    """Asks ranks on this machine to write what they are at."""
    for one in seen:
        if one.watched.pid is not None:
            os.kill(one.watched.pid, STACKS_ASKED_BY)


class HangWatch:
    """Looks at the ranks of one run."""

    def __init__(
        self,
        directory: RunDirectory,
        timeout_s: float,
        ask: Callable[[Collection[Seen]], None] = ask_for_stacks,
        answers_within_s: float = STACKS_S,
    ) -> None:
        """`timeout_s`: how long a run may go on after a rank that hangs was named. `ask` has ranks write what they are
        at; it may raise OSError. They have `answers_within_s` for that."""
        self._answers_within_s = answers_within_s
        self._directory, self._timeout_s, self._ask = directory, timeout_s, ask
        self._started = time.time()
        self._stopped: dict[int, float] = {}
        """Since when processes are seen to be stopped, by rank."""
        self._looked = 0.0
        self._named: tuple[int, ...] = ()
        """The ranks that hang and were named."""
        self._named_at: float | None = None
        self.hang: str | None = None
        """What hangs, in words; None where nothing does."""
        self.hang_in_short = ""
        """Without what differs each time: places, times and numbers of processes."""

    @property
    def is_overdue(self) -> bool:
        return self._named_at is not None and time.monotonic() - self._named_at > self._timeout_s

    @property
    def overdue_in_words(self) -> str:
        return f"run.hang_timeout_s={self._timeout_s:g} s are over: {self.hang}"

    def look(self, watched: Mapping[int, Watched]) -> str | None:
        """Looks at the ranks that run, by number, not more often than makes sense. Returns what is to be said."""
        if time.monotonic() - self._looked < LOOK_S:
            return None
        self._looked, now = time.monotonic(), time.time()
        seen = [self._see(rank, one, now) for rank, one in watched.items()]
        stopped = stopped_ranks(seen, now)
        if not stopped and not make_no_progress(seen, now):
            return self._goes_on()
        # of those that make no progress which one it is may look different each time
        ranks = tuple(one.rank for one in stopped)
        if self._named_at is not None and ranks == self._named:
            return None
        self._named, self._named_at = ranks, self._named_at or time.monotonic()
        stacks: dict[int, str] = {}
        # the disk or the file system may be what hangs
        with contextlib.suppress(OSError):
            stacks = self._stacks(seen)
        silent = [one for one in seen if any(stacks.values()) and one.is_asked and not stacks.get(one.rank)]
        waiting = {rank: call for rank, text in stacks.items() if (call := waits_in(text))}
        to_blame = stopped or silent or [one for one in seen if one.rank not in waiting] or seen
        if stopped:
            self.hang = "; ".join(map(_stopped_in_words, stopped))
        elif silent:
            self.hang = "; ".join(_silent_in_words(one) for one in silent)
        else:
            self.hang = _in_words(seen, waiting, now)
        self.hang_in_short = "; ".join(f"rank {one.rank} hangs {one.where()}" for one in to_blame)
        cures = [f"kill -CONT {one.watched.pid} lets it go on." for one in stopped]
        with contextlib.suppress(OSError):
            diagnosis = self._directory.logs / "diagnosis.txt"
            write_atomically(diagnosis, _diagnosis(self.hang, seen, to_blame, stacks, now), durable=False)
            cures.append(f"What each rank does: {diagnosis}.")
        limit = f"run.hang_timeout_s={self._timeout_s:g} s"
        return " ".join(
            [f"warning: {self.hang}.", *cures, f"Unless that changes, the run is ended in {limit}."]
        )

    def _goes_on(self) -> str | None:
        if self._named_at is None:
            return None
        self._named, self._named_at, self.hang, self.hang_in_short = (), None, None, ""
        return "All ranks go on."

    def _see(self, rank: int, watched: Watched, now: float) -> Seen:
        if watched.pid is not None and is_stopped(watched.pid):
            self._stopped.setdefault(rank, now)
        else:
            self._stopped.pop(rank, None)
        written, began = read_phase(self._directory.phase(rank)), self._started
        start = Phase(rank=rank, step=None, phase=START, since=began, progress=began, longest_s=None)
        return Seen(
            rank=rank,
            watched=watched,
            phase=written or start,
            has_written=written is not None,
            stopped_since=self._stopped.get(rank),
        )

    def _stacks(self, seen: list[Seen]) -> dict[int, str]:
        """Returns what the threads of each rank are at, as far as a rank can say it."""
        asked = [one for one in seen if one.is_asked]
        files = {one.rank: self._directory.stacks(one.rank) for one in asked}
        before = {rank: path.stat().st_size for rank, path in files.items() if path.is_file()}
        self._ask([one for one in asked if one.rank in before])
        deadline, sizes = time.monotonic() + self._answers_within_s, dict.fromkeys(before, -1)
        # until all have written, and none writes any more
        while time.monotonic() < deadline:
            last, sizes = sizes, {rank: files[rank].stat().st_size for rank in before}
            if sizes == last and all(sizes[rank] > before[rank] for rank in before):
                break
            time.sleep(0.1)
        return {
            rank: last_answer(files[rank].read_bytes()[start:].decode(errors="replace"))
            for rank, start in before.items()
        }


def _clock(moment: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(moment))


def _stopped_in_words(one: Seen) -> str:
    assert one.stopped_since is not None
    return (
        f"rank {one.rank} ({one.watched.place}) is stopped, by SIGSTOP or a debugger, since "
        f"{_clock(one.stopped_since)}, {one.where()}"
    )


def _silent_in_words(one: Seen) -> str:
    return (
        f"rank {one.rank} ({one.watched.place}) does not say what it is at, as where its process is stopped or its "
        f"machine hangs, {one.where()} since {_clock(one.phase.since)}"
    )


def _in_words(seen: list[Seen], waiting: Mapping[int, str], now: float) -> str:
    to_blame = [one for one in seen if one.rank not in waiting]
    quiet_s = now - max(one.phase.progress for one in seen)
    told = "; ".join(
        f"rank {one.rank} is {one.where()} since {_clock(one.phase.since)}" for one in (to_blame or seen)
    )
    others = ", ".join(f"rank {rank} waits for others in {call}" for rank, call in waiting.items())
    rest = f" ({others})" if others and to_blame else ", and each waits for others" if others else ""
    return f"no rank has made progress for {quiet_s:.0f} s: {told}{rest}"


def _diagnosis(
    hang: str, seen: list[Seen], to_blame: list[Seen], stacks: Mapping[int, str], now: float
) -> str:
    """Those to blame come first."""
    parts = [f"{_clock(now)} {hang}\n"]
    for one in sorted(seen, key=lambda one: one not in to_blame):
        call = waits_in(stacks.get(one.rank, ""))
        waits = f", waits for others in {call}" if call else ""
        parts.append(
            f"rank {one.rank}, {one.watched.place}: {one.where()}, last progress {_clock(one.phase.progress)}{waits}"
        )
        if one.stopped_since is not None:
            parts.append("It is stopped, and cannot say what it is at.")
        else:
            parts.append(folded(stacks.get(one.rank, "")) or "It does not say what it is at.")
        parts.append("")
    return "\n".join(parts)


def last_answer(stacks: str) -> str:
    """Returns the last of what faulthandler wrote each time it was asked: a signal may come twice. The current thread
    is the last of each."""
    starts = [match.start() for match in THREAD.finditer(stacks)]
    firsts = [0, *(after for at, after in pairwise(starts) if stacks.startswith("Current", at))]
    return stacks[firsts[-1] :]


def folded(stacks: str) -> str:
    """Returns the threads' stacks with those that are alike once, the main thread first: faulthandler writes it
    last."""
    texts = [text.strip("\n") for text in THREAD.split(stacks)[1:]]
    counts = Counter(reversed(texts))
    return "\n".join(
        f"{count} threads alike:\n{text}" if count > 1 else f"thread:\n{text}"
        for text, count in counts.items()
    )
