"""What a program is asked to do, and the tests that say whether it does."""

from dataclasses import dataclass
from typing import Literal

CaseKind = Literal["stdin", "call", "check"]


@dataclass(frozen=True)
class Case:
    """One test."""

    kind: CaseKind
    """`stdin`: printed for an input; `call`: returned for arguments; `check`: code that asserts."""
    input: str
    """What is read from standard input; the arguments, each as JSON on a line of its own; or the code."""
    expected: str = ""
    """What is to be printed; or the value to be returned, as JSON. Empty for code."""
    public: bool = False
    """Whether feedback may show it."""
    wrapped: bool = False
    """Whether `expected` may be a list around the value, as some sets have it."""


@dataclass(frozen=True)
class Suite:
    """All that judges a program."""

    cases: tuple[Case, ...]
    function: str = ""
    """The name that calls go to: of a function, or of a method of a class Solution."""
    program_names: tuple[str, ...] = ()
    """What tests that are code take from the program. Whatever else they name is Python's own or the preamble's,
    whatever the program calls so."""
    preamble: str = ""
    """Code that is there before the program: imports, and functions that were given with the question."""
