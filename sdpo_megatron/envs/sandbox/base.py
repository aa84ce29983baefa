"""What a sandbox is asked, what it answers, and the fault that is no answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from signal import SIGKILL, SIGXCPU
from typing import ClassVar, Literal, Protocol

from sdpo_megatron.errors import GradingFault

LimitName = Literal["wall", "cpu", "output", "disk"]


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    cpu_s: float = 6.0
    """Seconds of processor time of each process, rounded up to whole ones."""
    wall_s: float = 10.0
    """Seconds from before the sandbox starts until all of its processes are gone."""
    memory_bytes: int = 1 << 30
    """Address space of each process; also the size of all that the program writes to files, and of shared memory."""
    processes: int = 16
    """Processes and threads at one time, the first one included."""
    output_bytes: int = 1 << 20
    """Of standard output and of standard error, each."""
    file_bytes: int = 16 << 20
    """Size of one file."""


@dataclass(frozen=True)
class Program:
    """What is run: a command among files of its own. Raises ValueError where a file would lie outside."""

    argv: Sequence[str]
    """The command. A first word `python` is the interpreter that the sandbox has."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Contents by path, relative to the working directory; the program may change its own copy."""
    stdin: bytes = b""

    def __post_init__(self) -> None:
        if not self.argv or any("\0" in word for word in self.argv):
            raise ValueError(f"a program needs a command of words without NUL; this is {self.argv!r}")
        for name in self.files:
            path = PurePosixPath(name)
            if not path.name or path.is_absolute() or ".." in path.parts or "\0" in name:
                raise ValueError(f"file {name!r} is not a path below the working directory")


@dataclass(frozen=True)
class Outcome:
    """What the sandbox itself observed. Only `stdout_bytes` and `stderr_bytes` are the program's own words."""

    exit_code: int | None
    """None where a signal ended the program, or a limit."""
    signal: int | None
    """What ended the program, if a signal did. A shell's convention: exit codes above 128 count as signals."""
    stdout_bytes: bytes
    stderr_bytes: bytes
    """Both cut at the limit of output."""
    limit: LimitName | None
    """The limit for which the sandbox, or the kernel, ended the program. Memory, processes and file size, and where it
    can be all files together (`disk`), are refused to the program as it asks for them: they show in its own error."""
    wall_s: float
    """Seconds, start and end of the sandbox included."""

    @classmethod
    def of(
        cls,
        code: int | None,
        ended_for: LimitName | None,
        out: bytes,
        err: bytes,
        wall_s: float,
        limits: Limits,
    ) -> "Outcome":
        """Returns what came of a program that printed `out` and `err`. It exited with `code`, which is minus the signal
        where one ended it, or was ended for a limit."""
        code = code if ended_for is None else None
        ended_by = None
        if code is not None and not 0 <= code <= 128:
            ended_by, code = -code if code < 0 else code - 128, None
        if ended_by == SIGXCPU or (ended_by == SIGKILL and wall_s >= limits.cpu_s):
            ended_for = "cpu"
        return cls(
            exit_code=code,
            signal=ended_by,
            stdout_bytes=out[: limits.output_bytes],
            stderr_bytes=err[: limits.output_bytes],
            limit=ended_for,
            wall_s=wall_s,
        )


class SandboxFault(GradingFault):
    """The sandbox did not work. Says nothing about the program: it may be asked again, and is never graded."""


class Sandbox(Protocol):
    """A way to run programs. Safe from several threads at once; keeps nothing from one program to the next."""

    name: ClassVar[str]
    python: str
    """The interpreter, as the program sees its path."""

    def run(self, program: Program, limits: Limits) -> Outcome:
        """Runs the program and returns once all of its processes are gone. Raises SandboxFault."""
        ...
