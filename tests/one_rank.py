"""One rank, and what another one would have sent it."""

from typing import Any


class Rank:
    """Rank 0, or one to which rank 0 sends `from_main`."""

    def __init__(self, is_main: bool, from_main: Any = None):
        self.is_main, self.from_main = is_main, from_main

    def everywhere(self, work):
        return work()

    def share(self, value):
        return value if self.is_main else self.from_main
