"""Errors that are the user's to mend. The entry point prints them in one line and exits with code 2."""


class UserError(Exception):
    """Says what is, what should be, and what to do, in one line."""


class ConfigError(UserError):
    """A setting that is unknown, missing, mistyped or impossible."""


class RunFailed(Exception):
    """The run cannot go on for a reason outside its settings; what is saved is intact. Exit code 1, no traceback."""
