"""What ends a command with one line for the person who reads it, and the loss of a server, which a run survives."""

from collections.abc import Sequence

EXIT_FAILED, EXIT_USER_ERROR, EXIT_PEER_LOST = 1, 2, 3
"""Exit codes: the command cannot go on; the user has something to mend; of a rank alone, another rank ended."""
LONGEST_VALUE = 80
"""Characters of a wrong value that a message repeats."""


class ReportedError(Exception):
    """An error that ends the command with its message alone, without a traceback."""

    def __init__(self, message: str, log_end: Sequence[str] = ()) -> None:
        """`log_end` are lines of a log to show below the message."""
        self.message, self.log_end = message, list(log_end)
        super().__init__("\n".join(map(one_line, [message, *log_end])))


class UserError(ReportedError):
    """A mistake that the user has to mend: the message says what is, what should be, and what to do. Exit code 2."""


class ConfigError(UserError):
    """A setting that is unknown, missing, mistyped or impossible."""


class TeacherRefused(UserError):
    """Learning from the teacher would make the policy worse; raised on all ranks, before the weights change."""


class RunFailed(ReportedError):
    """The run cannot go on for a reason outside its settings; what is saved is intact. Exit code 1."""


class PeerLost(RunFailed):
    """This rank cannot go on because another one ended or has a bug, which that one reports. Exit code 3."""


class PolicyBroken(RunFailed):
    """The policy's weights are not worth saving: what they compute is not finite."""


class ServerRefused(RunFailed):
    """A server understood a request and refused it: a bug of ours, or a server of another kind or version."""


class ServerLost(Exception):
    """A server is unreachable, fails (5xx) or hangs. What it was asked can be asked again after a restart."""

    def __init__(self, message: str, url: str = "") -> None:
        """`url` names the server, where one alone is lost."""
        self.url = url
        # a part of it may be the server's own words
        super().__init__(one_line(message))


class GradingFault(Exception):
    """The infrastructure of a grader failed, not the response: its sandbox does not start, say, or its service is not
    reachable. The response is graded again, and left out where that fails again and again."""


def one_line(text: str) -> str:
    """Returns `text` with everything that would not print as a character of a line spelt as its escape."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def quoted(value: object) -> str:
    """Returns a wrong value as a message repeats it, cut to LONGEST_VALUE characters."""
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."
