"""How a run knows its own weights again, on servers that others may push to as well."""

import re
from dataclasses import dataclass

from sdpo_megatron.errors import ServerLost, UserError


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
