"""How the launcher, which owns the servers, and rank 0, which uses them, talk: small files per server.

servers/0.json     {"url", "pid", "starts"}: the launcher writes it at every start, before it is healthy
servers/0.key      the server's key, which only the owner may read, until rank 0 has taken it
servers/0.restart  rank 0 asks for a restart; holds the `starts` that it complains about
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from sdpo_megatron.files import write_atomically, write_private


class ServerRecord(TypedDict):
    url: str
    pid: int
    """The id of the main process."""
    starts: int
    """How often the launcher has started it in this run of the launcher: 1, 2, ..."""


@dataclass(frozen=True)
class ServerFiles:
    directory: Path
    """`RunDirectory.servers`; must exist."""

    def give_key(self, index: int, key: str) -> None:
        """Lays the server's key where rank 0 will take it."""
        write_private(self._key(index), key)

    def take_key(self, index: int) -> str:
        """Returns the server's key, and removes the file that held it."""
        key = self._key(index).read_text(encoding="utf-8")
        self.remove_key(index)
        return key

    def remove_key(self, index: int) -> None:
        """Removes what no rank has taken."""
        self._key(index).unlink(missing_ok=True)

    def read(self, index: int) -> ServerRecord | None:
        """Returns what the launcher wrote last; None before the first start."""
        try:
            return json.loads(self._record(index).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def write(self, index: int, record: ServerRecord) -> None:
        write_atomically(self._record(index), json.dumps(record) + "\n", durable=False)

    def ask_for_restart(self, index: int, starts: int) -> None:
        """Asks for a restart. `starts` is as it was when the server was last well: the request lapses if it was
        restarted since."""
        write_atomically(self._request(index), f"{starts}\n", durable=False)

    def take_request(self, index: int) -> int | None:
        """Returns the `starts` that rank 0 complains about, once; else None."""
        try:
            starts = int(self._request(index).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        self._request(index).unlink()
        return starts

    def _record(self, index: int) -> Path:
        return self.directory / f"{index}.json"

    def _key(self, index: int) -> Path:
        return self.directory / f"{index}.key"

    def _request(self, index: int) -> Path:
        return self.directory / f"{index}.restart"
