"""How a run knows its own weights again, on servers that others may push to as well."""

import re
from dataclasses import dataclass
from typing import Protocol

from sdpo_megatron.errors import ServerLost, UserError


class MarkReader(Protocol):
    """Says which version of the weights a server answered from."""

    def read(self, mark: str, url: str) -> int: ...


class UnchangedWeights:
    """Takes whatever weights a server has, as long as they stay the same."""

    def __init__(self) -> None:
        self._first: dict[str, str] = {}

    def read(self, mark: str, url: str) -> int:
        """Returns 0. Raises UserError where the server at `url` had other weights before."""
        first = self._first.setdefault(url, mark)
        if mark != first:
            raise UserError(
                f"The server at {url} was given other weights meanwhile ({mark}, before {first}), so that the figures "
                "would be of neither: evaluate while nobody trains with it."
            )
        return 0


@dataclass(frozen=True)
class WeightMark:
    """Weights are marked `RUN-VERSION`; `run` is hexadecimal, and another at every start of a trainer."""

    run: str

    def write(self, version: int) -> str:
        return f"{self.run}-{version}"

    def read(self, mark: str, url: str) -> int:
        """Returns the version of the weights that the server at `url` says it has.

        Raises ServerLost where nobody has pushed to it since it was started, UserError where another run has."""
        if not re.fullmatch("[0-9a-f]+-[0-9]+", mark):
            raise ServerLost(f"the server at {url} was started anew, without the run's weights", url)
        run, version = mark.split("-")
        if run != self.run:
            raise UserError(
                f"The server at {url} has weights that another run pushed ({mark}; this run's begin with {self.run}): "
                "give each run servers of its own."
            )
        return int(version)
